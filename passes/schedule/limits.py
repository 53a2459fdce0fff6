"""What a schedule's microbatches hold at once: no stage more of them, and no rank more bytes, than
planned. Linear in the number of actions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from ...compiler.ir.actions import Action, Kind, Schedule
from .fault import FaultError, drawn


def verify_in_flight(schedule: Schedule, limits: Sequence[int]) -> None:
    """No stage stashes more microbatches than planned.

    Raises:
        VerificationError: at the forward that is one too many.
    """
    last = last_parts(schedule)
    held = [0] * len(limits)
    for rank, actions in enumerate(schedule):
        for index, action in enumerate(actions):
            stage = action.stage
            if action.kind is Kind.F:
                held[stage] += 1
                if held[stage] > limits[stage]:
                    said = f"stage {stage} holds {held[stage]} microbatches, planned"
                    fault = FaultError(f"{said} {limits[stage]}", (rank, index))
                    raise drawn(schedule, fault)
            elif action.kind is last.get(stage):
                held[stage] -= 1


def peaks_held(
    schedule: Schedule, stash: Sequence[float], carry: Sequence[float]
) -> tuple[float, ...]:
    """Per rank, the most that its microbatches hold at once, in the unit of what is given.

    Args:
        stash: of a microbatch on each stage, held from its F to the end of its B.
        carry: held from there to the end of its W; without a W, nothing.
    """
    walked = [_held(actions, stash, carry, last_parts([actions])) for actions in schedule]
    return tuple(max((held for _, held in row), default=0.0) for row in walked)


def verify_held(
    schedule: Schedule,
    stash_bytes: Sequence[float],
    carry_bytes: Sequence[float],
    limit_bytes: Sequence[float],
) -> None:
    """No rank's microbatches hold more at once than its limit (`peaks_held`).

    Raises:
        VerificationError: at the first action after which a rank holds too much.
    """
    for rank, actions in enumerate(schedule):
        for index, held in _held(actions, stash_bytes, carry_bytes, last_parts([actions])):
            if held > limit_bytes[rank]:
                sentence = (
                    f"after {actions[index]} rank {rank} holds {held:,.0f} bytes of microbatches, "
                    f"planned {limit_bytes[rank]:,.0f}"
                )
                raise drawn(schedule, FaultError(sentence, (rank, index)))


def _held(
    actions: Sequence[Action],
    stash: Sequence[float],
    carry: Sequence[float],
    last: Mapping[int, Kind],
) -> Iterator[tuple[int, float]]:
    """Position of each computation of a rank, and what is held after it."""
    counts: dict[tuple[int, Kind], int] = defaultdict(int)
    for index, action in enumerate(actions):
        if not action.kind.computes:
            continue
        stage, kind = action.stage, action.kind
        if kind is Kind.F:
            counts[stage, Kind.F] += 1
        elif kind is Kind.B:
            counts[stage, Kind.F] -= 1
            counts[stage, Kind.B] += last[stage] is Kind.W
        else:
            counts[stage, Kind.B] -= 1
        # from the counts, not by adding and taking away: that would leave rounding behind
        yield (
            index,
            sum(n * (stash if k is Kind.F else carry)[s] for (s, k), n in counts.items()),
        )


def last_parts(schedule: Sequence[Sequence[Action]]) -> dict[int, Kind]:
    """Stage -> the computation that ends its microbatches: W where it has one."""
    last: dict[int, Kind] = {}
    for actions in schedule:
        for action in actions:
            if action.kind is Kind.W:
                last[action.stage] = Kind.W
            elif action.kind is Kind.B:
                last.setdefault(action.stage, Kind.B)
    return last

"""What a schedule asks of its ranks: microbatches that they hold, and time in which they wait."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...compiler.ir.actions import Action, Kind, Phase, Schedule
from ..generators.shape import PipelineShape
from .limits import last_parts
from .simulate import Timeline, simulate

MOST_MOMENTS = 12
"""Of a rank, that are told apart; of more, those with least to tell are taken together."""

Counts = tuple[int, ...]
"""Of one moment: per stage of a rank, its microbatches in flight."""


@dataclass(frozen=True)
class Load:
    """What a schedule asks of its ranks, where all stages are alike.

    Attributes:
        in_flight: per stage, the most microbatches between their forward and their last backward.
        together: per rank, the moments at which its stages hold most together.
        idle: seconds in which the busiest rank waits, as a multiple of the (p − 1) stages'
            seconds that 1F1B waits for with one stage per rank.
    """

    in_flight: Counts
    together: tuple[tuple[Counts, ...], ...]
    idle: float


def load_of(schedule: Schedule, shape: PipelineShape) -> Load:
    """Of the compute actions of a schedule.

    B and W take as long as F, and an undivided B as long as both.
    """
    together = tuple(
        _moments(actions, stages) for actions, stages in zip(schedule, shape.placement, strict=True)
    )
    most = {
        stage: max(counts)
        for stages, moments in zip(shape.placement, together, strict=True)
        for stage, counts in zip(stages, zip(*moments, strict=True), strict=True)
    }
    in_flight = tuple(most[stage] for stage in range(shape.n_stages))
    return Load(in_flight, together, _idle(schedule, shape))


def timed(
    schedule: Schedule,
    shape: PipelineShape,
    compute_s: Mapping[tuple[int, Kind], float],
    transfer_s: Mapping[tuple[int, int], float],
    send_s: Mapping[tuple[int, int], float] | None = None,
) -> Timeline:
    """Compute actions in time, where each stage waits for its neighbours alone."""
    return simulate(linked(schedule, shape), compute_s, transfer_s, send_s=send_s)


def far_of(transfer_s: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The messages that are not between neighbours, of all: (from, to)."""
    return tuple(sorted((a, b) for a, b in transfer_s if abs(a - b) > 1))


def linked(
    schedule: Schedule, shape: PipelineShape, far: Sequence[tuple[int, int]] = ()
) -> Schedule:
    """With messages between neighbours, and ``far`` others (`far_of`), such as a tied gradient's
    from the last stage to the first."""
    from ...compiler.ir.program import Message  # which imports torch; the registry does not
    from .communication import add_communication

    pairs = [(s, s + 1) for s in range(shape.n_stages - 1)]
    messages = [Message(a, b, Phase.FORWARD, ()) for a, b in pairs]
    messages += [Message(b, a, Phase.BACKWARD, ()) for a, b in pairs]
    messages += [Message(a, b, (Phase.BACKWARD, Phase.FORWARD)[a < b], ()) for a, b in far]
    return add_communication(schedule, messages)


def _idle(schedule: Schedule, shape: PipelineShape) -> float:
    if shape.ranks == 1:
        return 0.0
    part = 1 / shape.virtual
    compute_s = {
        (stage, kind): part * (2 if kind is Kind.B and not splits else 1)
        for stage, splits in enumerate(shape.splits)
        for kind in (Kind.F, Kind.B, Kind.W)
    }
    timeline = timed(schedule, shape, compute_s, {})
    busy = max(timeline.busy_s(rank) for rank in range(shape.ranks))
    return (timeline.makespan_s - busy) / (3 * (shape.ranks - 1))


def _moments(actions: Sequence[Action], stages: Sequence[int]) -> tuple[Counts, ...]:
    """The counts of which none is at most another."""
    place = {stage: i for i, stage in enumerate(stages)}
    last = last_parts([actions])
    now, seen = [0] * len(stages), dict[Counts, None]()
    for action in actions:
        if action.kind is Kind.F:
            now[place[action.stage]] += 1
            seen[tuple(now)] = None
        elif action.kind is last.get(action.stage):
            now[place[action.stage]] -= 1
    found = sorted(_undominated(seen), key=sum, reverse=True)
    if len(found) <= MOST_MOMENTS:
        return tuple(found) or ((0,) * len(stages),)
    rest = tuple(map(max, zip(*found[MOST_MOMENTS - 1 :], strict=True)))
    return _undominated([*found[: MOST_MOMENTS - 1], rest])


def _undominated(moments: Iterable[Counts]) -> tuple[Counts, ...]:
    each = dict.fromkeys(moments)
    kept: dict[Counts, None] = {}
    for counts in sorted(each, key=sum, reverse=True):  # what is within another has less in all
        if not any(_within(counts, other) for other in kept):
            kept[counts] = None
    return tuple(counts for counts in each if counts in kept)


def _within(a: Counts, b: Counts) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True))

"""What ranks keep whole over a step, of what levels 2 and 3 of ZeRO divide: as much as fits.

A parameter that is kept is gathered once per step and not for every program; a gradient that is
kept leaves once per step and not with every microbatch. Whole at the peak is whole: to keep
something over some microbatches takes as much memory as over all of them, and exchanges it more
often. So it is all or none, layer by layer, in the order of what is spared for a byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..ir.program import PipelineProgram, Role, StageProgram
from ..ir.shards import added
from ..ir.zero import Kept, Zero, layer_of

Size = Callable[[str], int]
"""Bytes of a parameter."""


@dataclass(frozen=True)
class Division:
    """How replicas divide what they hold, and how often they exchange it."""

    zero: Zero
    dp: int
    microbatches: int


@dataclass(frozen=True)
class Keepable:
    """Of one layer on one rank, what can be kept.

    Attributes:
        names: FQNs.
        gradients: of these, and not the parameters themselves.
        times: how often they are exchanged in a step where they are not kept.
        nbytes: of them whole.
    """

    names: tuple[str, ...]
    gradients: bool
    times: int
    nbytes: int


def keepable(
    program: PipelineProgram, mates: Sequence[int], of: Division, size: Size
) -> list[Keepable]:
    """What a rank can keep, in the order in which it is worth its memory: first what is exchanged
    most often, of that the smallest.

    Args:
        program: as it is without parameters that are gathered.
        mates: the stages of the rank.
    """
    stages, found = [program.stages[s] for s in mates], []
    for gradients, uses in ((False, _reads(stages)), (True, _adds(stages))):
        if not (of.zero.streams if gradients else of.zero.divides_params):
            continue
        layers: dict[str, list[str]] = {}
        for name in uses:
            layers.setdefault(layer_of(name), []).append(name)
        for names in layers.values():
            times = max(uses[name] for name in names) * of.microbatches
            found.append(Keepable(tuple(names), gradients, times, sum(map(size, names))))
    worth = [each for each in found if each.times > 1]
    return sorted(worth, key=lambda each: (-each.times, each.nbytes))  # stable: in model order


def _reads(stages: Sequence[StageProgram]) -> Counter[str]:
    """Parameter -> how many programs read it."""
    return Counter(
        name
        for stage in stages
        for part in stage.parts.values()
        for name in dict.fromkeys(
            str(port.key) for port in part.inputs if port.role in (Role.PARAM, Role.COPY)
        )
    )


def _adds(stages: Sequence[StageProgram]) -> Counter[str]:
    """Parameter -> how many programs add to its gradient."""
    return Counter(
        name for stage in stages for names in added(stage).values() for name in dict.fromkeys(names)
    )


def fill(
    program: PipelineProgram,
    of: Division,
    ranks: Sequence[Sequence[int]],
    size: Size,
    peaks: Callable[[Sequence[Kept]], Sequence[int]],
    budgets: Sequence[float],
) -> tuple[Kept, ...]:
    """Per stage, what its rank keeps; nothing where no rank keeps anything.

    Args:
        program: as it is without parameters that are gathered.
        ranks: the stages of each.
        peaks: per rank the most bytes at once, if stages keep so much; a rank's depend on its own.
        budgets: of the ranks in bytes, which fit if nothing is kept.
    """
    chosen = [keepable(program, mates, of, size) for mates in ranks]
    fits, most = [0] * len(ranks), [len(each) for each in chosen]
    tried = most
    while any(count > fit for count, fit in zip(tried, fits, strict=True)):
        found = peaks(_kept(chosen, tried, ranks))
        for rank, (peak, count) in enumerate(zip(found, tried, strict=True)):
            if peak <= budgets[rank]:
                fits[rank] = count
            else:
                most[rank] = count - 1
        tried = [-(-(fit + end) // 2) for fit, end in zip(fits, most, strict=True)]
    return _kept(chosen, fits, ranks) if any(fits) else ()


def _kept(
    chosen: Sequence[Sequence[Keepable]], counts: Sequence[int], ranks: Sequence[Sequence[int]]
) -> tuple[Kept, ...]:
    """Per stage, where each rank keeps the first so many."""
    made: dict[int, Kept] = {}
    for mine, count, stages in zip(chosen, counts, ranks, strict=True):
        params = [n for each in mine[:count] if not each.gradients for n in each.names]
        grads = [n for each in mine[:count] if each.gradients for n in each.names]
        made |= dict.fromkeys(stages, Kept(tuple(params), tuple(grads)))
    return tuple(made[stage] for stage in sorted(made))


def kept_notes(kept: Sequence[Kept], size: Size) -> Iterator[str]:
    """What is kept, in words."""
    for what, names in (
        ("parameters", [each.params for each in kept]),
        ("gradients", [each.grads for each in kept]),
    ):
        mib = [sum(map(size, each)) / 2**20 for each in names]
        if any(mib):
            each = ", ".join(f"{n:.4g}" for n in mib)
            yield f"of {what} stages keep {each} MiB whole over a step"

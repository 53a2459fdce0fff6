"""What ranks keep whole over a step, of what levels 2 and 3 of ZeRO divide: what shortens it.

A parameter that is kept is gathered once per step and not for every program; a gradient that is
kept leaves once per step and not with every microbatch. Whole at the peak is whole: to keep
something over some microbatches takes as much memory as over all of them, and exchanges it more
often. So it is all or none, layer by layer, in the order of what is spared for a byte.

Programs hide what they exchange as long as they compute, and nothing hides the one gather before
them. So a stage keeps only as much as its exchange takes longer than that (`worthwhile`), of that
as much as fits, and nothing at all where the simulated step is no shorter for it (`fill`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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


LEAST_GAIN = 1e-4  # of a step: less is not worth its memory
ROUNDING = 1e-12  # of seconds


@dataclass(frozen=True)
class Trial:
    """What programs take with something kept: each is worked out when it is asked for.

    Attributes:
        peaks: per rank the most bytes at once; a rank's depend on what it keeps alone.
        stages_s: per stage the seconds of all its microbatches, with what nothing hides of what
            its replicas exchange.
        step_s: the simulated step.
    """

    peaks: Callable[[Sequence[Kept]], Sequence[float]]
    stages_s: Callable[[Sequence[Kept]], Sequence[float]]
    step_s: Callable[[Sequence[Kept]], float]


def fill(
    program: PipelineProgram,
    of: Division,
    ranks: Sequence[Sequence[int]],
    size: Size,
    trial: Trial,
    budgets: Sequence[float],
) -> tuple[Kept, ...]:
    """Per stage, what its rank keeps; nothing where no rank keeps anything.

    Args:
        program: as it is without parameters that are gathered.
        ranks: the stages of each.
        budgets: of the ranks in bytes, which fit if nothing is kept.
    """
    offered = [[keepable(program, (s,), of, size) for s in mates] for mates in ranks]
    worth = worthwhile(offered, ranks, trial.stages_s)
    chosen = [
        [each for each in keepable(program, mates, of, size) if _wanted(each, mine)]
        for mates, mine in zip(ranks, worth, strict=True)
    ]
    fits = _fitting(chosen, ranks, trial.peaks, budgets)
    if not any(fits):
        return ()
    kept = _leanest(chosen, fits, ranks, trial)
    shorter = trial.step_s(kept) < trial.step_s(()) * (1 - LEAST_GAIN)
    return kept if shorter else ()


def _leanest(
    chosen: Sequence[Sequence[Keepable]],
    counts: Sequence[int],
    ranks: Sequence[Sequence[int]],
    trial: Trial,
) -> tuple[Kept, ...]:
    """What is kept, without the ranks for which nobody waits: those that gain least are the first
    to do without, until the step gets longer."""
    kept = _kept(chosen, counts, ranks)
    pairs = zip(trial.stages_s(()), trial.stages_s(kept), strict=True)
    gains = [before - after for before, after in pairs]
    keeping = [rank for rank, count in enumerate(counts) if count]
    left = list(counts)
    for rank in sorted(keeping, key=lambda rank: sum(gains[s] for s in ranks[rank])):
        left[rank] = 0
        fewer = _kept(chosen, left, ranks)
        if trial.step_s(fewer) > trial.step_s(kept) * (1 + ROUNDING):
            break
        kept = fewer
    return kept


def worthwhile(
    offered: Sequence[Sequence[Sequence[Keepable]]],
    ranks: Sequence[Sequence[int]],
    stages_s: Callable[[Sequence[Kept]], Sequence[float]],
) -> list[list[Keepable]]:
    """Per rank, of what its stages can keep that which makes them faster: of parameters, then of
    gradients, so many of the first that one more is no gain.

    One more of them spares as much of the exchange with every microbatch as the one before, as long
    as that is not hidden, and takes as much before the first: the gain falls from one to the next.

    Args:
        offered: per rank and stage, as `keepable` has it.
    """
    stages = [stage for mates in ranks for stage in mates]
    flat = dict(zip(stages, (each for mine in offered for each in mine), strict=True))
    taken: dict[int, list[Keepable]] = {stage: [] for stage in stages}
    for gradients in (False, True):
        lists = {s: [x for x in mine if x.gradients == gradients] for s, mine in flat.items()}

        def with_(counts: Mapping[int, int], lists: Mapping[int, list[Keepable]] = lists) -> Kept_:
            mine = {s: taken[s] + lists[s][: counts[s]] for s in stages}
            each = [[x for s in mates for x in mine[s]] for mates in ranks]
            return _kept(each, [len(x) for x in each], ranks)

        counts = _slopes(lists, lambda counts: stages_s(with_(counts)))
        for s in stages:
            taken[s] += lists[s][: counts[s]]
    return [[x for s in mates for x in taken[s]] for mates in ranks]


Kept_ = tuple[Kept, ...]


def _slopes(
    lists: Mapping[int, Sequence[Keepable]],
    stages_s: Callable[[Mapping[int, int]], Sequence[float]],
) -> dict[int, int]:
    """Per stage how many of its list, so that one more is no gain: with gains that fall, both ends
    are looked at first, then halves."""
    low = dict.fromkeys(lists, 0)
    high = {s: len(mine) for s, mine in lists.items()}
    probe: Callable[[int], int]
    probes = [lambda s: low[s], lambda s: high[s] - 1]
    while any(low[s] < high[s] for s in lists):
        probe = probes.pop(0) if probes else lambda s: (low[s] + high[s]) // 2
        here = {s: min(probe(s), high[s]) if low[s] < high[s] else low[s] for s in lists}
        more = {s: min(count + 1, high[s]) for s, count in here.items()}
        pairs = zip(stages_s(here), stages_s(more), strict=True)
        gains = [before - after > ROUNDING * before for before, after in pairs]
        for s in lists:
            if low[s] < high[s]:
                low[s], high[s] = (more[s], high[s]) if gains[s] else (low[s], here[s])
    return low


def _wanted(each: Keepable, worth: Sequence[Keepable]) -> bool:
    """Whether one of a rank's stages wants it."""
    names = {name for x in worth if x.gradients == each.gradients for name in x.names}
    return not names.isdisjoint(each.names)


def _fitting(
    chosen: Sequence[Sequence[Keepable]],
    ranks: Sequence[Sequence[int]],
    peaks: Callable[[Sequence[Kept]], Sequence[float]],
    budgets: Sequence[float],
) -> list[int]:
    """Per rank, how many of the first of its list fit."""
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
    return fits


def _kept(
    chosen: Sequence[Sequence[Keepable]], counts: Sequence[int], ranks: Sequence[Sequence[int]]
) -> tuple[Kept, ...]:
    """Per stage, where each rank keeps the first so many."""
    made: dict[int, Kept] = {}
    for mine, count, stages in zip(chosen, counts, ranks, strict=True):
        params = [n for each in mine[:count] if not each.gradients for n in each.names]
        grads = [n for each in mine[:count] if each.gradients for n in each.names]
        kept = Kept(tuple(dict.fromkeys(params)), tuple(dict.fromkeys(grads)))
        made |= dict.fromkeys(stages, kept)
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

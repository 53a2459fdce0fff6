"""The exchange between replicas, as actions of a schedule (`compiler.ir.zero`).

======  =====================================================================================
level   what is inserted
======  =====================================================================================
0       REDUCE_GRAD, once per step: the mean over the replicas, everywhere
1       UNSHARD before the first computation: every replica's rows of the parameters, to all;
        REDUCE_GRAD: the mean of a replica's rows, to that replica
2       the same UNSHARD; REDUCE_B and REDUCE_W after each backward that makes gradients: they
        are on their way; REDUCE_GRAD: the last of them has arrived
3       as 2, without UNSHARD: programs gather their parameters (`passes.programs.gather`)
2, 3    what a rank keeps over a step (`Kept`) has UNSHARD, and no REDUCE_B and REDUCE_W
======  =====================================================================================

Tied gradients are summed over the stages before the rows are divided at levels 0 and 1. Above,
each replica sums its own rows afterwards, which is a share of the traffic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from itertools import pairwise

from ...compiler.ir.actions import Action, Kind, Schedule, homes_of
from ...compiler.ir.program import PipelineProgram
from ...compiler.ir.shards import added
from ...compiler.ir.zero import Zero
from .fault import FaultError, drawn

REDUCE = {Kind.B: Kind.REDUCE_B, Kind.W: Kind.REDUCE_W}
REDUCED = {reduce: kind for kind, reduce in REDUCE.items()}
ONCE = (Kind.UNSHARD, Kind.REDUCE_GRAD, Kind.SYNC_TIED)


def add_exchange(schedule: Schedule, program: PipelineProgram, dp: int, zero: Zero) -> Schedule:
    """Insert the exchange between replicas into a schedule that communicates already."""
    homes = homes_of(schedule)
    adds = {
        (code.stage, kind)
        for code in program.stages
        for kind, names in added(code).items()
        if not all(zero.whole_grad(name, code.kept) for name in names)
    }
    streams = dp > 1 and zero.streams
    rows: list[tuple[Action, ...]] = []
    for rank, actions in enumerate(schedule):
        mine = [stage for stage in sorted(homes) if homes[stage] == rank]
        first = [a for stage in mine for a in _opening(stage, program, dp, zero)]
        last = _closing(mine, program, dp, zero)
        rows.append((*first, *(_reducing(actions, adds) if streams else actions), *last))
    return tuple(rows)


def _opening(stage: int, program: PipelineProgram, dp: int, zero: Zero) -> list[Action]:
    code, divides = program.stages[stage], dp > 1 and zero.divides_states
    whole = divides and any(zero.whole_param(name, code.kept) for name in code.params)
    return [Action(stage, Kind.UNSHARD)] if whole else []


def _reducing(actions: Sequence[Action], adds: Container[tuple[int, Kind]]) -> list[Action]:
    """What a backward has made leaves after it, where gradients stream.

    Args:
        adds: (stage, kind) of the programs whose gradients leave with every microbatch.
    """
    made: list[Action] = []
    for action in actions:
        made.append(action)
        if (action.stage, action.kind) in adds:
            made.append(Action(action.stage, REDUCE[action.kind], action.microbatch))
    return made


def _closing(stages: Sequence[int], program: PipelineProgram, dp: int, zero: Zero) -> list[Action]:
    """Of a rank: its tied gradients are summed together, and so are its replicas'."""
    if not program.trains:
        return []
    tied = [s for s in stages if any(s in each.holders for each in program.tied)]
    adds = [s for s in stages if s in tied or program.stages[s].grads]
    sums = [Action(s, Kind.SYNC_TIED) for s in tied]
    means = [Action(s, Kind.REDUCE_GRAD) for s in adds if dp > 1]
    return means + sums if zero.streams else sums + means


# -- is it legal? ---------------------------------------------------------------------------------


def verify_exchange(schedule: Schedule, program: PipelineProgram, dp: int, zero: Zero) -> None:
    """Replicas exchange gradients when all are added, tied ones where the table above says so.

    Raises:
        VerificationError: with the action that stands in the wrong place.
    """
    homes = homes_of(schedule)
    places: dict[int, list[int]] = {stage: [] for stage in homes}
    for actions in schedule:
        for at, action in enumerate(actions):
            places[action.stage].append(at)
    try:
        for stage, mine in places.items():
            opening = _opening(stage, program, dp, zero)
            needed = opening + _closing([stage], program, dp, zero)
            _check_stage(homes[stage], schedule[homes[stage]], mine, needed)
        for rank, actions in enumerate(schedule):
            _check_order(rank, actions, Kind.REDUCE_GRAD if zero.streams else Kind.SYNC_TIED)
    except FaultError as fault:
        raise drawn(schedule, fault) from None


def _check_stage(
    rank: int, actions: Sequence[Action], places: Sequence[int], needed: Sequence[Action]
) -> None:
    """
    Args:
        places: where the actions of one stage are in its rank's list.
        needed: what has to be there once.
    """
    found = Counter(actions[at] for at in places if actions[at].kind in ONCE)
    computes = [at for at in places if actions[at].kind.computes]
    for action in {**dict.fromkeys(needed), **found}:
        if found[action] != 1:
            said = f"stage {action.stage} has {found[action]} {action.kind}"
            raise FaultError(said, (rank, computes[-1]))
    for before, at in pairwise([-1, *places]):
        action = actions[at]
        if action.kind is Kind.UNSHARD and at > computes[0]:
            raise FaultError(f"stage {action.stage} computes before {action}", (rank, at))
        if action.kind in (Kind.REDUCE_GRAD, Kind.SYNC_TIED) and at < computes[-1]:
            raise FaultError(f"{action} comes before {actions[computes[-1]]}", (rank, at))
        if action.kind in REDUCED:
            made, kind = actions[before], REDUCED[action.kind]
            if before < 0 or (made.kind, made.microbatch) != (kind, action.microbatch):
                made = Action(action.stage, kind, action.microbatch)
                raise FaultError(f"{action} does not follow {made}", (rank, at))


def _check_order(rank: int, actions: Sequence[Action], first: Kind) -> None:
    """A rank's tied gradients are all summed before, or all after, its replicas' are averaged; and
    after all its messages, whose links they share."""
    before: Action | None = None
    for at, action in enumerate(actions):
        if action.kind in (Kind.REDUCE_GRAD, Kind.SYNC_TIED):
            if before is not None and action.kind is first is not before.kind:
                raise FaultError(f"{action} is on the wrong side of {before}", (rank, at))
            before = action
        elif action.peer is not None and before is not None and before.kind is Kind.SYNC_TIED:
            raise FaultError(f"{action} comes after {before}", (rank, at))

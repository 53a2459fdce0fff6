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
======  =====================================================================================

Tied gradients are summed over the stages before the rows are divided at levels 0 and 1. Above,
each replica sums its own rows afterwards, which is a share of the traffic.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.ir.actions import Action, Kind, Schedule, homes_of
from ...compiler.ir.program import PipelineProgram
from ...compiler.ir.shards import added
from ...compiler.ir.zero import Zero

REDUCE = {Kind.B: Kind.REDUCE_B, Kind.W: Kind.REDUCE_W}


def add_exchange(schedule: Schedule, program: PipelineProgram, dp: int, zero: Zero) -> Schedule:
    """Insert the exchange between replicas into a schedule that communicates already."""
    homes = homes_of(schedule)
    rows: list[tuple[Action, ...]] = []
    for rank, actions in enumerate(schedule):
        mine = [stage for stage in sorted(homes) if homes[stage] == rank]
        first = [a for stage in mine for a in _opening(stage, program, dp, zero)]
        last = _closing(mine, program, dp, zero)
        rows.append((*first, *_reducing(actions, program, dp, zero), *last))
    return tuple(rows)


def _opening(stage: int, program: PipelineProgram, dp: int, zero: Zero) -> list[Action]:
    whole = dp > 1 and zero.unshards and program.stages[stage].params
    return [Action(stage, Kind.UNSHARD)] if whole else []


def _reducing(
    actions: Sequence[Action], program: PipelineProgram, dp: int, zero: Zero
) -> list[Action]:
    """What a backward has made leaves after it, where gradients stream."""
    if dp == 1 or not zero.streams:
        return list(actions)
    adds = {(code.stage, kind) for code in program.stages for kind in added(code)}
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

"""A placed graph -> stage programs, actions, memory: all that needs no choice."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import fx

from ...passes.schedule.exchange import add_exchange
from ..capture.capture import ForwardPass
from ..costs.cluster import kinds_at
from ..costs.timing import Timing
from ..ir.actions import Pace, Schedule, compute_only
from ..ir.errors import OptionError
from ..ir.graph import JointGraph
from ..ir.locality import Locality
from ..ir.precision import Precision
from ..ir.program import PipelineProgram
from ..ir.zero import Kept
from ..losses.logits import Chunks
from ..memory.rank_memory import RankMemory
from ..plan.decision import Decision
from ..planning.target import Target
from ..planning.team import StageSeconds, Team
from . import passes
from .passes import Pass
from .record import PassRecord, Recorder
from .work import Exported, Settings, Work

W = TypeVar("W")


def run(
    level: str, listed: Sequence[Pass[W]], work: W, recorder: Recorder, skip: Collection[str] = ()
) -> None:
    """The passes of one level, but for those that are skipped, each with its checks."""
    for each in listed:
        if not each.when(work):
            continue
        with recorder.record(level, each.name, each.told or each.name in skip) as outcome:
            if each.name in skip:
                outcome.note = "skipped"
                continue
            outcome.note = each.run(work)
            for check in each.verify:
                check(work)
            outcome.texts |= each.dump(work)


def forward_passes(
    mixed: Precision | None,
    device: str,
    skip: Collection[str],
    records: list[PassRecord],
    chunks: Chunks | None = None,
) -> tuple[ForwardPass, ...]:
    """The passes over the exported graph, for capturing, which runs them between its two steps.

    What has no line of its own in the plan stands in that of the capture.

    Args:
        device: the type that is planned for.
        records: gets those of the last graph that was exported.
        chunks: how losses are computed in pieces; None for whole.
    """

    def rewriting(each: Pass[Exported]) -> ForwardPass:
        def rewrite(module: fx.GraphModule, leaves: Sequence[torch.Tensor]) -> str:
            recorder = Recorder(None)
            run("forward", (each,), Exported(module, leaves, mixed, device, chunks), recorder, skip)
            if each is passes.FORWARD[0]:
                records.clear()
            records.extend(recorder.records)
            return "".join(record.note for record in recorder.records if not record.told)

        return rewrite

    return tuple(map(rewriting, passes.FORWARD))


@dataclass(frozen=True)
class Assembly:
    """What follows from a placement.

    Attributes:
        graph: a copy of the one that was placed, with what the passes inserted.
        stage: of its staged nodes.
        copies: a node of the backward -> the forward node that it computes again.
        whole: the programs as they are without parameters that are gathered (zero=3).
        fused: the programs that run, where fusions of operators are compiled.
        memory: per rank.
        timing: of the programs.
        graphed: programs are recorded and replayed.
        work: that the passes have left.
    """

    graph: JointGraph
    stage: dict[fx.Node, int]
    copies: dict[fx.Node, fx.Node]
    program: PipelineProgram
    whole: PipelineProgram
    fused: PipelineProgram | None
    schedule: Schedule
    memory: tuple[RankMemory, ...]
    timing: Timing
    pace: Pace
    graphed: bool
    work: Work


def assemble(
    settings: Settings,
    graph: JointGraph,
    locality: Locality,
    stage: dict[fx.Node, int],
    recomputed: Collection[fx.Node],
    decision: Decision,
    order: Schedule | None,
    pace: Pace | None,
    recorder: Recorder,
) -> Assembly:
    """Run the passes over a copy of the graph, which itself stays as it is.

    Args:
        order: of the compute actions, where a plan has decided it.
        pace: of the graph that this one follows.
    """
    own, twin = graph.copy()
    work = Work(
        settings,
        own,
        locality.moved(twin),
        {twin[node]: s for node, s in stage.items()},
        frozenset(twin[node] for node in recomputed),
        decision,
        order,
        pace,
    )
    skip = settings.options.skip
    run("placed", passes.PLACED, work, recorder, skip)
    run("programs", passes.PROGRAMS, work, recorder, skip)
    run("schedule", passes.SCHEDULE, work, recorder, skip)
    _tell_of_graphs(work, recorder)
    assert work.whole is not None
    return Assembly(
        own,
        work.stage,
        work.copies,
        work.made,
        work.whole,
        work.fused,
        work.schedule,
        work.memory,
        work.timing,
        pace or Pace(compute_only(work.schedule), *work.seconds()),
        work.graphed,
        work,
    )


def kept_with(draft: Assembly, kept: Sequence[Kept]) -> Assembly:
    """A draft, if ranks kept so much of its whole over a step; its memory is that of the draft.

    Args:
        kept: per stage.
    """
    work = replace(draft.work, program=draft.whole.keeping(kept), fused=None)
    run(
        "programs",
        [each for each in passes.PROGRAMS if each.name in ("gather", "fusions")],
        work,
        Recorder(None),
    )
    inner = [[a for a in row if a.kind.computes or a.peer is not None] for row in draft.schedule]
    dp, zero = work.settings.options.dp, work.settings.zero
    schedule = add_exchange(tuple(map(tuple, inner)), work.made, dp, zero)
    timing = draft.timing.of(work.made)
    return replace(draft, program=work.made, schedule=schedule, timing=timing, work=work)


def _tell_of_graphs(work: Work, recorder: Recorder) -> None:
    """Raises OptionError where programs are to be recorded that cannot be."""
    wanted, why = work.settings.options.cudagraphs, work.unrecordable
    if not wanted or not work.made.trains:
        return
    if why and wanted is True:
        raise OptionError(
            f'cudagraphs=True: {why}: leave it out, or give cudagraphs="auto", which records '
            "where it can"
        )
    with recorder.record("schedule", "cudagraphs") as outcome:
        shape = "programs for microbatches of this shape, the first, are recorded; others run as is"
        outcome.note = f"not recorded: {why}" if why else shape


def corrected(
    decision: Decision,
    assembly: Assembly,
    target: Target,
    team: Team,
    batch: Sequence[torch.Tensor],
) -> Decision:
    """With the units' seconds scaled to what whole stages take, in the schedule's order.

    Args:
        batch: the leaves of one microbatch.
    """
    program, timing = assembly.whole, assembly.timing
    if not target.measures or not program.trains:
        return decision
    team.together(lambda: None)  # alone a rank would be faster than beside others
    found: dict[str, dict[int, StageSeconds]] = {}
    for kind, profiler in target.profilers.items():
        stages = team.stages(len(program.stages))
        mine = [s for s in stages if kind in kinds_at(timing.rates, timing.home[s])]
        order = [
            (mine.index(action.stage), action.kind, action.microbatch or 0)
            for actions in compute_only(assembly.schedule)
            for action in actions
            if action.stage in mine
        ]
        times = profiler.times([program.stages[s] for s in mine], batch, order)
        pairs = zip(mine, times, strict=True)
        found[kind] = {s: (each.forward_s, each.backward_s, each.weight_s) for s, each in pairs}
    return decision.scaled(team.pool_stages(found))

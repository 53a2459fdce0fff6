"""What the passes work on, level by level."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import fx

from ...passes.generators.shape import PipelineShape
from ...passes.schedule.registry import ScheduleKind
from ..capture.skeleton import Skeleton
from ..costs import reserved
from ..costs.hardware import Device
from ..costs.reserved import NOTHING
from ..costs.timing import Timing
from ..ir.actions import Kind, Pace, Schedule
from ..ir.graph import JointGraph
from ..ir.locality import Locality
from ..ir.precision import Precision
from ..ir.program import PipelineProgram, StageProgram
from ..ir.zero import Zero
from ..losses.logits import Chunks
from ..memory.footprint import Footprint, Measure
from ..memory.graphed import graphed_bytes, obstacle
from ..memory.rank_memory import RankMemory, rank_memory
from ..options.options import CompileOptions
from ..options.parsing import AUTO
from ..plan.decision import Decision
from ..planning.parts import Parts


def footprint_of(
    skeleton: Skeleton,
    options: CompileOptions,
    zero: Zero,
    measure: Measure,
    touched: Mapping[str, int],
    stepped_rows: Collection[str],
) -> Footprint:
    """Of a model under these options; arguments as `Footprint` has them."""
    return Footprint(
        skeleton.module,
        options.optimizer,
        options.dtypes,
        options.dp,
        zero,
        skeleton.updated,
        options.training,
        measure,
        options.compression.gradients,
        touched,
        stepped_rows,
    )


@dataclass(frozen=True)
class Settings:
    """What passes are told besides what they work on.

    Attributes:
        options: with the level of ZeRO that was chosen.
        microbatches: per replica.
        batch_bytes: of one microbatch.
        device: the type that the programs run on.
        rates: seconds are priced by.
        budget_bytes: memory of a rank; infinity for no limit.
        whole: that is all that its device has (`Target.whole`).
        drafts: the programs are made to learn what they take, or a step is to be known roughly;
            nothing is searched for them.
        runs: what a stage's programs become where they run, as far as memory goes, if they are
            measured there.
    """

    options: CompileOptions
    zero: Zero
    footprint: Footprint
    microbatches: int
    batch_bytes: int
    device: str
    rates: Device
    budget_bytes: float = math.inf
    drafts: bool = False
    whole: bool = False
    runs: Callable[[StageProgram], StageProgram] | None = None

    @property
    def budgets(self) -> tuple[float, ...]:
        """Bytes of memory, per rank of a replica."""
        if self.whole and self.rates.ranks:
            return tuple(device.memory_bytes for device in self.rates.ranks)
        return (self.budget_bytes,) * self.options.n_stages

    def taken(self, program: PipelineProgram, rank: int) -> list[tuple[str, int]]:
        """What a rank's device takes for itself, by what; nothing where budgets are not its own, or
        it is a CPU."""
        device, dp = self.rates.at(rank), self.options.dp
        if not self.whole or device.reserved == NOTHING:
            return []
        homes = self.shape.homes
        ways = {(homes[a], homes[b]) for a, b in program.routes if homes[a] != homes[b]}
        links = sum(rank in ends for ends in ways)
        return list(device.reserved.parts(links, dp, self.beside(rank)))

    def beside(self, rank: int) -> int:
        """How many other replicas of a rank share its machine, at most."""
        placed = self.rates.at(rank).placed
        return min(self.options.dp, reserved.SHARED) - 1 if placed is None else placed.beside(rank)

    def along(self, decision: Decision) -> Settings:
        """With the devices of its ranks."""
        return replace(self, rates=self.rates.along(decision.devices))

    @property
    def keeps(self) -> bool:
        """Whether ranks keep whole what fits of what replicas exchange with each microbatch: where
        it was said how much they may use."""
        divides = self.options.dp > 1 and (self.zero.streams or self.zero.divides_params)
        options = self.options
        return divides and options.zero_keep == AUTO and options.memory is not None

    @property
    def schedule(self) -> ScheduleKind:
        return self.options.kind

    @property
    def shape(self) -> PipelineShape:
        """The pipeline before anything is known of its stages."""
        return self.options.shape(self.microbatches)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Per stage, the most microbatches that it holds at once."""
        return self.options.load(self.microbatches).in_flight


@dataclass(frozen=True)
class Outline:
    """What plans of a graph are made from, before anything is decided.

    Attributes:
        rows: of a microbatch.
    """

    settings: Settings
    graph: JointGraph
    locality: Locality
    parts: Parts
    rows: int

    @cached_property
    def held_bytes(self) -> dict[str, int]:
        """Of each parameter, its gradient and its states."""
        graph = self.graph
        return self.settings.footprint.held_bytes(graph.copies, graph.copied_alone)


@dataclass(frozen=True)
class Exported:
    """The forward graph as torch.export made it, before it is differentiated.

    Attributes:
        leaves: its arguments, fake.
        mixed: the precision, if it computes in a narrower dtype than fp32.
        device: the type that is planned for.
        chunks: how losses are computed in pieces; None for whole.
    """

    module: fx.GraphModule
    leaves: Sequence[torch.Tensor]
    mixed: Precision | None
    device: str
    chunks: Chunks | None = None


@dataclass(frozen=True)
class Joint:
    """Forward, loss and backward in one graph, which has no stages yet.

    Attributes:
        held: the dtype of every parameter and buffer between steps.
        splits: whether weight gradients have programs of their own.
    """

    graph: JointGraph
    mixed: Precision | None
    held: Mapping[str, torch.dtype] = field(default_factory=dict)
    splits: bool = False


@dataclass
class Work:
    """A graph on its way to programs and actions; passes change it, and fill in what they make.

    Attributes:
        stage: of every staged node.
        recomputed: forward nodes that the backward computes again.
        decision: what the units take.
        order: the compute actions, where a plan has decided them.
        pace: of the graph that this one follows, whose order decides where both are trained.
        copies: a node of the backward -> the forward node that it computes again.
        program: None before `lower`.
        whole: the programs as they are without parameters that are gathered.
        fused: the programs that run, where fusions of operators are compiled.
        schedule: empty before `schedule`.
        memory: per rank; empty before `memory`.
    """

    settings: Settings
    graph: JointGraph
    locality: Locality
    stage: dict[fx.Node, int]
    recomputed: Collection[fx.Node]
    decision: Decision
    order: Schedule | None = None
    pace: Pace | None = None
    copies: dict[fx.Node, fx.Node] = field(default_factory=dict)
    program: PipelineProgram | None = None
    whole: PipelineProgram | None = None
    fused: PipelineProgram | None = None
    schedule: Schedule = ()
    memory: tuple[RankMemory, ...] = ()

    @cached_property
    def timing(self) -> Timing:
        """What the programs take, asked first when they are all made."""
        settings = self.settings
        mates = [settings.shape.mates(s) for s in range(settings.options.stage_count)]
        units, shares = self.decision.stages_and_seconds, self.decision.weight_shares
        of = self.made, self.stage, self.copies, units, shares
        return Timing(*of, settings.rates, settings.footprint, mates)

    def seconds(self) -> tuple[Mapping[tuple[int, Kind], float], Mapping[tuple[int, int], float]]:
        """By which receives are posted: of computations, and of messages."""
        if self.pace is not None:
            return self.pace.compute_s, self.pace.transfer_s
        return self.timing.compute_s(), self.timing.transfer_s()

    def memories(self, schedule: Schedule) -> tuple[RankMemory, ...]:
        """Of every rank, if its actions are these."""
        settings, program = self.settings, self.made
        footprint, share = settings.footprint, settings.batch_bytes * settings.microbatches
        found, graphed, running = [], self.graphed, self.running
        if settings.runs is not None:
            stages = tuple(map(settings.runs, running.stages))
            running = replace(running, stages=stages)
        for rank, actions in enumerate(schedule):
            mine = list(dict.fromkeys(action.stage for action in actions))
            memory = rank_memory(
                running,
                actions,
                footprint.static(program, mine, share),
                settings.options.dp,
                footprint.optimizer_bytes(program, mine) if program.trains else 0,
                {stage: footprint.traffic(program, stage, mine) for stage in mine},
            )
            most = memory.static.total + graphed_bytes(self.running, actions) if graphed else 0
            if most > memory.peak_bytes:
                memory = replace(memory, peak_bytes=most, peak_at="GRAPHS")
            taken = sum(size for _, size in settings.taken(program, rank))
            found.append(replace(memory, device_bytes=taken))
        return tuple(found)

    @property
    def graphed(self) -> bool:
        """Whether programs are recorded and replayed."""
        return bool(self.settings.options.cudagraphs) and not self.unrecordable

    @property
    def unrecordable(self) -> str:
        """Why they cannot be; "" if they can."""
        if not self.made.trains:
            return "only training is"
        return obstacle(self.running, self.settings.zero.level)

    @property
    def made(self) -> PipelineProgram:
        """The programs, which are there from `lower` on."""
        assert self.program is not None
        return self.program

    @property
    def running(self) -> PipelineProgram:
        """Those that run."""
        return self.fused or self.made

"""What the passes work on, level by level."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from ...passes.generators.shape import PipelineShape
from ...passes.schedule.registry import SCHEDULES, ScheduleKind
from ..costs.footprint import Footprint
from ..costs.memory import RankMemory
from ..ir.actions import Schedule
from ..ir.graph import JointGraph
from ..ir.locality import Locality
from ..ir.precision import Precision
from ..ir.program import PipelineProgram
from ..ir.zero import Zero
from ..options.options import CompileOptions


@dataclass(frozen=True)
class Settings:
    """What passes are told besides what they work on.

    Attributes:
        options: with the level of ZeRO that was chosen.
        microbatches: per replica.
        batch_bytes: of one microbatch.
        device: the type that the programs run on.
    """

    options: CompileOptions
    zero: Zero
    footprint: Footprint
    microbatches: int
    batch_bytes: int
    device: str

    @property
    def schedule(self) -> ScheduleKind:
        return SCHEDULES[self.options.schedule]

    @property
    def shape(self) -> PipelineShape:
        """The pipeline before anything is known of its stages."""
        return self.schedule.shape(self.options.n_stages, self.microbatches)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Per stage, the most microbatches that it holds at once."""
        return self.schedule.in_flight(self.shape)


@dataclass(frozen=True)
class Exported:
    """The forward graph as torch.export made it, before it is differentiated.

    Attributes:
        leaves: its arguments, fake.
        mixed: the precision, if it computes in a narrower dtype than fp32.
        device: the type that is planned for.
    """

    module: fx.GraphModule
    leaves: Sequence[torch.Tensor]
    mixed: Precision | None
    device: str


@dataclass(frozen=True)
class Joint:
    """Forward, loss and backward in one graph, which has no stages yet."""

    graph: JointGraph
    mixed: Precision | None


@dataclass
class Work:
    """A graph on its way to programs and actions; passes change it, and fill in what they make.

    Attributes:
        stage: of every staged node.
        recomputed: forward nodes that the backward computes again.
        copies: a node of the backward -> the forward node that it computes again.
        program: None before `lower`.
        whole: the programs as they are without parameters that are gathered.
        schedule: empty before `schedule`.
        memory: per rank; empty before `memory`.
    """

    settings: Settings
    graph: JointGraph
    locality: Locality
    stage: dict[fx.Node, int]
    recomputed: Collection[fx.Node]
    copies: dict[fx.Node, fx.Node] = field(default_factory=dict)
    program: PipelineProgram | None = None
    whole: PipelineProgram | None = None
    schedule: Schedule = ()
    memory: tuple[RankMemory, ...] = ()

    @property
    def made(self) -> PipelineProgram:
        """The programs, which are there from `lower` on."""
        assert self.program is not None
        return self.program

"""What comes out of compiling one graph, and what it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

from ...passes.schedule.simulate import Timeline
from ..answers.guards import Guards
from ..answers.inputs import Scalars
from ..effects.outside import Read
from ..ir.actions import Schedule
from ..ir.problem import Problem
from ..ir.program import PipelineProgram
from ..options.options import CompileOptions
from ..plan.plan import Plan
from ..rows.loss import LossForm
from ..rows.outputs import Output
from .layout import Layout
from .record import PassRecord


class Mode(StrEnum):
    """What a program is for."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    FORWARD = "forward"


def main_mode(options: CompileOptions) -> Mode:
    """What is planned for: training, or a forward that returns all that the model does."""
    return Mode.TRAIN if options.training else Mode.FORWARD


@dataclass(frozen=True)
class Compiled:
    """One graph, lowered and scheduled.

    Attributes:
        graphed: its programs are recorded and replayed.
        fused: the program that runs, where operators are fused; ``program`` says all else.
        rebuild: puts the results back into the structure that the model returns (FORWARD).
        outputs: per result, how those of microbatches are joined (FORWARD).
        timeline: the simulated step.
        layout: what other graphs of the model follow.
        records: what each pass did, in order.
        problem: the partitioning problem that this process solved, if it did.
        outside: what the graph has as constants and is not the model's.
        guards: what forward has asked the batch, and the answers that the graph is made for.
        loss: how the losses of microbatches make that of the batch, where the graph tells it.
        scalars: the floats of a microbatch that it is given, between the leaves and the shares.
    """

    program: PipelineProgram
    schedule: Schedule
    plan: Plan
    rebuild: Callable[[list[torch.Tensor]], Any]
    outputs: tuple[Output, ...]
    timeline: Timeline
    layout: Layout
    records: tuple[PassRecord, ...]
    problem: Problem | None = None
    outside: tuple[Read, ...] = ()
    guards: Guards = field(default_factory=Guards)
    loss: LossForm | None = None
    scalars: Scalars = field(default_factory=Scalars)
    fused: PipelineProgram | None = None
    graphed: bool = False

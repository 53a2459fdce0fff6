"""Programs to time: a small model lowered with every unit, or everything, as a stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pipecompile.compiler.capture import batch as batches
from pipecompile.compiler.capture.capture import capture_training
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.costs.hardware import CPU
from pipecompile.compiler.ir.graph import JointGraph
from pipecompile.compiler.ir.locality import backward_places, locality_of
from pipecompile.compiler.ir.program import StageProgram
from pipecompile.compiler.units.units import units_of
from pipecompile.passes.programs.lower import lower
from torch import nn


def captured(model: nn.Module, batch: Any, eager_modules: Iterable[str] = ()) -> JointGraph:
    device = torch.device("cpu")
    spec = batches.flatten(batch)[1]
    skeleton = skeleton_of(model, device, eager_modules=eager_modules)
    return capture_training(skeleton, spec, None, device).graph


def programs(graph: JointGraph, whole: bool = False, split: bool = False) -> list[StageProgram]:
    """A stage program per unit, or one of all.

    Args:
        split: with weight gradients in programs of their own.
    """
    locality = locality_of(graph)
    units = units_of(graph, locality, CPU)
    place = {node: 0 if whole else unit.index for unit in units for node in unit.nodes}
    stages = backward_places(graph, locality, place)
    return list(
        lower(graph, locality, stages, max(place.values()) + 1, split_backward=split).stages
    )

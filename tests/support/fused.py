"""Fusions that no backend compiles: they run as they are, and what differs is the split's.

Products are added to sums of gradients after they are made, as eager programs do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from pipecompile.compiler.ir.ops import Slot
from pipecompile.compiler.ir.program import FUSION, Program
from pipecompile.runtime import start
from pipecompile.runtime.kernels import kernels
from pipecompile.runtime.state.bucket import GradSlot
from torch import fx, nn


@contextmanager
def interpreted(made: Callable[[nn.Module], nn.Module] = lambda fusion: fusion) -> Iterator[None]:
    """backend="inductor" without Inductor.

    Args:
        made: what runs a fusion.
    """
    with (
        mock.patch.object(start, "settled", lambda options, device: (options, "")),
        mock.patch.object(kernels, "_kernel", lambda name, fusion, *_: made(fusion)),
        mock.patch.object(GradSlot, "add_product", Slot.add_product),
    ):
        yield


def calls(program: Program) -> list[fx.Node]:
    """Of fusions, in order."""
    nodes = program.module.graph.nodes
    return [n for n in nodes if n.op == "call_module" and str(n.target).startswith(FUSION)]


def programs(pipe: Any) -> dict[str, Program]:
    """Stage and part -> the program that runs, as in "0F"."""
    return {
        f"{stage.stage}{part}": program
        for stage in pipe.compiled.fused.stages
        for part, program in stage.parts.items()
    }

"""Programs take their arguments in a list, which they empty, and let go of what they have read."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from pipecompile.compiler.ir.program import BoxedCodeGen
from torch import fx


def test_arguments_are_let_go_when_they_are_last_read() -> None:
    seen: list[list[bool]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append([alive() is not None for alive in watched])
        return x + 1

    graph = fx.Graph()
    graph.set_codegen(BoxedCodeGen())
    first, second = graph.placeholder("first"), graph.placeholder("second")
    product = graph.call_function(torch.mul, (first, 2))
    looked = graph.call_function(look, (product,))
    graph.output((graph.call_function(torch.add, (looked, second)),))
    module = fx.GraphModule(torch.nn.Module(), graph)
    boxed: list[Any] = [torch.ones(3), torch.ones(3)]
    watched = [weakref.ref(each) for each in boxed]
    made: Sequence[torch.Tensor] = module.forward(boxed)
    assert boxed == []
    assert seen == [[False, True]]
    assert torch.equal(made[0], torch.full((3,), 4.0))

"""Code of graph modules that is written when they are called."""

from __future__ import annotations

from unittest import mock

import torch
from pipecompile.compiler.tracing.unwritten import unwritten
from torch import fx, nn


def doubled() -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.mul, (x, 2)))
    return fx.GraphModule({}, graph)


def test_code_is_written_by_the_first_call() -> None:
    written = mock.patch.object(fx.Graph, "python_code", autospec=True, side_effect=AssertionError)
    with written, unwritten():
        module = doubled()
        (given,) = module.graph.find_nodes(op="placeholder")
        (made,) = module.graph.find_nodes(op="call_function", target=torch.mul)
        made.args = (given, 3)
        module.recompile()
    ones = torch.ones(2)
    assert torch.equal(module(ones), 3 * ones)
    assert torch.equal(nn.Sequential(module, module)(ones), 9 * ones)
    assert "3" in module.code


def test_afterwards_code_is_written_at_once() -> None:
    with unwritten():
        pass
    assert "2" in doubled().code


def test_exported_graphs_run() -> None:
    with unwritten():
        exported = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),), strict=False).module()
    assert exported(torch.ones(1, 2)).shape == (1, 2)

"""What element-wise operators move where a backend fuses them."""

from __future__ import annotations

from typing import Any

import torch
from pipecompile.compiler.costs.fused import fused_bytes
from pipecompile.compiler.tensors.fakes import weightless
from pipecompile.passes.programs.fusions import is_fusable
from torch import fx

aten = torch.ops.aten
SIZE = 64 * 64 * 4


def graph_of(*calls: tuple[Any, str, str]) -> list[fx.Node]:
    """A chain of operators (operator, second operand, module) on 64 × 64 numbers.

    A second operand is "" for none, "same" for the first one, or the name of another input.
    """
    graph = fx.Graph()
    with weightless():
        value = torch.empty(64, 64)
    nodes = [graph.placeholder("x")]
    nodes[0].meta["val"] = value
    for op, other, module in calls:
        args = [nodes[-1]]
        if other:
            args.append(nodes[-1] if other == "same" else graph.placeholder(other))
            args[-1].meta["val"] = value
        made = graph.call_function(op, tuple(args))
        made.meta |= {"val": value, "module": module}
        nodes.append(made)
    return nodes[1:]


def test_only_ends_of_a_fusion_move_bytes() -> None:
    first, second, third = graph_of(
        (aten.add.Tensor, "y", "h.0"), (aten.gelu.default, "", "h.0"), (aten.mul.Tensor, "z", "h.0")
    )
    assert fused_bytes(first) == (2 * SIZE, 0)
    assert fused_bytes(second) == (0, 0)
    assert fused_bytes(third) == (SIZE, SIZE)


def test_products_and_other_layers_end_a_fusion() -> None:
    first, product, after, other = graph_of(
        (aten.relu.default, "", "h.0.mlp"),
        (aten.mm.default, "w", "h.0.mlp"),
        (aten.relu.default, "", "h.0.mlp"),
        (aten.relu.default, "", "h.1.mlp"),
    )
    assert not is_fusable(product)
    assert fused_bytes(first) == (SIZE, SIZE)
    assert fused_bytes(after) == fused_bytes(other) == (SIZE, SIZE)

"""A tensor joined to nothing is a copy.

The caches of transformers begin as tensors without elements, to which each layer's keys and values
are joined. Nobody reads the cache in training, but attention reads what the join made: a copy in
row-major order, which kernels may compute otherwise with than with its source. So the copy stays,
and what is left of the cache goes.

Works on the exported forward graph, before differentiation.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch import fx, nn

from ...compiler.ir.graph import behind

_ATEN = torch.ops.aten
_JOIN = _ATEN.cat.default


def copy_where_nothing_is_joined(
    module: fx.GraphModule, leaves: Sequence[torch.Tensor] = ()
) -> str:
    """Make copies of joins with one operand that has elements; returns a note."""
    del leaves  # shapes are in the graph
    changed = 0
    for node in module.graph.find_nodes(op="call_function", target=_JOIN):
        parts = cast(list[fx.Node], node.args[0])
        full = [part for part in parts if _value(part).numel()]
        trained = any(_reads_parameter(module, part) for part in parts if part not in full)
        alone = len(full) == 1 and len(parts) > 1 and not trained
        if alone and _is_copy(_value(node), _value(full[0])):
            node.target, node.args = _ATEN.clone.default, (full[0],)
            node.kwargs = {"memory_format": torch.contiguous_format}
            changed += 1
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return f"{changed} joins with nothing" if changed else ""


def _reads_parameter(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a parameter without elements is behind a value: it gets a gradient, of as many."""
    read = (str(each.target) for each in behind(node) if each.op == "get_attr")
    return any(isinstance(operator.attrgetter(name)(module), nn.Parameter) for name in read)


def _value(node: fx.Node) -> torch.Tensor:
    return cast(torch.Tensor, node.meta["val"])


def _is_copy(joined: torch.Tensor, part: torch.Tensor) -> bool:
    alike = joined.shape == part.shape and joined.dtype is part.dtype
    return alike and joined.is_contiguous()

"""Some operators compute in fp32, and everything around them in the dtype that it has.

    x (bf16) ──▶ op ──▶ y (bf16)      becomes      x ▶ widen ──▶ op ──▶ narrow ▶ y (bf16)

Where parameters are cast, and not operators, there is no list of them; this is what ``fp32=`` asks
for. Works on the exported forward graph, before differentiation, so that gradients are cast with
them.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import fx

from ...compiler.ir.errors import OptionError
from ...compiler.ir.graph import is_getitem, is_operator, written
from ...compiler.ir.precision import REDUCED

_TO = torch.ops.aten.to.dtype


def compute_in_fp32(module: fx.GraphModule, names: Collection[str]) -> str:
    """Insert the casts in place; returns a note.

    Args:
        names: of ATen operators, all overloads alike.

    Raises:
        OptionError: one that a model in training does not call, or that writes into an operand.
    """
    called: set[str] = set()
    count = 0
    for part in [each for each in module.modules() if isinstance(each, fx.GraphModule)]:
        for node in [each for each in part.graph.nodes if is_operator(each)]:
            name = _name(node)
            called.add(name)
            if name in names:
                count += _widen(part.graph, node, name)
        part.recompile()
    for name in names:
        if name not in called and torch.is_grad_enabled():
            raise OptionError(
                f"Precision: the model calls no operator {name!r}; it calls "
                f"{', '.join(sorted(called - {''}))}"
            )
    return f"{count} operators in fp32" if count else ""


def _widen(graph: fx.Graph, node: fx.Node, name: str) -> int:
    """1 if an operator computes in another dtype now."""
    narrow = [each for each in node.all_input_nodes if _is_narrow(each)]
    if not narrow:
        return 0
    if written(node):
        raise OptionError(f"Precision: {name!r} writes into what it is given: it keeps its dtype")
    results = [each for each in _results(node) if _is_narrow(each)]
    with graph.inserting_before(node):
        wide = {each: _cast(graph, each, torch.float32) for each in narrow}
    node.args = fx.node.map_arg(node.args, lambda each: wide.get(each, each))
    node.kwargs = fx.node.map_arg(node.kwargs, lambda each: wide.get(each, each))
    for result in results:
        dtype = result.meta["val"].dtype
        with graph.inserting_after(result):
            back = _cast(graph, result, dtype)
        back.meta["val"] = result.meta["val"]
        result.meta = {**result.meta, "val": result.meta["val"].to(torch.float32)}
        result.replace_all_uses_with(back, delete_user_cb=partial(operator.is_not, back))
    return 1


def _results(node: fx.Node) -> Iterator[fx.Node]:
    """The operator itself, or what is taken of the several that it returns."""
    if isinstance(node.meta.get("val"), (tuple, list)):
        yield from filter(is_getitem, node.users)
    else:
        yield node


def _cast(graph: fx.Graph, source: fx.Node, dtype: torch.dtype) -> fx.Node:
    cast = graph.call_function(_TO, (source, dtype))
    kept = {k: v for k, v in source.meta.items() if k in ("nn_module_stack", "stack_trace")}
    cast.meta = kept | {"val": source.meta["val"].to(dtype)}
    return cast


def _is_narrow(node: fx.Node) -> bool:
    value: Any = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in REDUCED


def _name(node: fx.Node) -> str:
    target: Any = node.target
    namespace, _, name = target._schema.name.partition("::")
    return str(name) if namespace == "aten" else ""

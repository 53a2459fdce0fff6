"""A linear layer and the cross-entropy over its results become one operator, which makes the
logits piece by piece (`compiler.losses.pieces`).

    hidden ─▶ linear ─▶ casts, views, slices, scale, softcap ─▶ cross_entropy ─▶ loss
    hidden ─▶ the same views and slices ─▶ chunked_loss ─▶ sum or mean ─▶ loss

Views and slices leave the classes alone, so they can be made of the hidden states; what is done to
each logit is told to the operator. The logarithm of the sum of exponentials may be read too
(z-loss). Where anything else reads logits they have to exist, and the graph stays as it is.

Works on the exported forward graph, before differentiation and after casts were inserted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...compiler.ir.errors import OptionError
from ...compiler.losses.logits import usual_rows, wide_of
from ...compiler.losses.pieces import FORWARD
from .chunkable import VIEWS, Found, Whole, arguments, live_in, losses_in, recognised

_ATEN = torch.ops.aten
_NONE, _MEAN, _SUM = range(3)  # torch's ``reduction``
SMALL = 8
"""Losses over so many times fewer classes than the largest stay whole."""


def chunk_losses(module: fx.GraphModule, rows: int, asked: bool) -> str:
    """Rewrite in place; returns a note.

    Args:
        rows: the logits of so many tokens exist at once; 0 for what is usual.
        asked: a user gave a number.

    Raises:
        OptionError: a number was asked for, and training computes no loss that can be chunked.
    """
    found, reasons = _found_in(module.graph)
    whole = f"logits stay whole: {'; '.join(reasons)}" if reasons else ""
    if not found:
        if asked and torch.is_grad_enabled():
            raise OptionError(
                f"chunked_loss={rows}: the loss is not one whose logits can be left out: "
                f"{'; '.join(reasons)}. "
                'Leave chunked_loss= out, or give "auto", which computes what it can in chunks'
            )
        return whole
    most = max(each.classes for each in found)
    large = [each for each in found if each.classes * SMALL >= most]
    notes = [_rewrite(module, each, rows or usual_rows(most)) for each in large]
    notes += [f"those of {each.classes} stay whole" for each in found if each not in large]
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return "; ".join(filter(None, [*notes, whole]))


def _found_in(graph: fx.Graph) -> tuple[list[Found], list[str]]:
    """The losses that can be computed in pieces, and why others cannot."""
    live = live_in(graph)
    found: list[Found] = []
    reasons: list[str] = []
    losses = losses_in(live)
    for node in losses:
        try:
            found.append(recognised(node, live))
        except Whole as refused:
            reasons.append(str(refused))
    if not losses:
        reasons.append("it calls no cross_entropy")
    return found, list(dict.fromkeys(reasons))


def chunk_rows(graph: fx.Graph) -> int:
    """Of how many tokens logits exist at once in a graph; 0 where they are whole."""
    return max((int(node.args[9]) for node in graph.nodes if node.target is FORWARD), default=0)


# -- rewriting ------------------------------------------------------------------------------------


def _rewrite(module: fx.GraphModule, found: Found, rows: int) -> str:
    """Put the operator in the place of a loss; a note."""
    assert found.hidden is not None
    assert found.weight is not None
    graph = module.graph
    first = min(found.loss, *found.readers) if found.readers else found.loss
    call = _Calls(graph, first, found)
    hidden = found.hidden
    for move in found.moves:
        hidden = call(*_moved(move, hidden))
    weight = call(_ATEN.t.default, found.weight) if found.turned else found.weight
    steps = " ".join(map(str, found.steps))
    made = call(
        FORWARD,
        *(hidden, weight, found.bias, found.offset, found.labels, found.class_weight),
        *(found.ignore_index, found.smoothing, steps, rows),
    )
    losses, logsumexp = (call(operator.getitem, made, i) for i in range(2))
    for reader in found.readers:
        _replace(reader, _as(call, logsumexp, reader.meta["val"].dtype))
    call = _Calls(graph, found.loss, found)
    _replace(found.loss, _as(call, _reduced(call, found, losses), found.dtype))
    tokens = found.labels.meta["val"].shape
    shape = " × ".join(str(size) for size in (*tokens, found.classes))
    return f"logits of {shape} exist for {rows} tokens at a time"


def _moved(move: fx.Node, hidden: fx.Node) -> tuple[Any, ...]:
    """A view or slice of logits -> the same of hidden states: operator and operands."""
    if move.target not in VIEWS:
        return (move.target, hidden, *move.args[1:])
    width = hidden.meta["val"].shape[-1]
    shape: Any = arguments(move)["size" if move.target is not _ATEN.reshape.default else "shape"]
    return _ATEN.reshape.default, hidden, [*shape[:-1], width]


def _reduced(call: _Calls, found: Found, losses: fx.Node) -> fx.Node:
    """What cross-entropy makes of the losses of tokens."""
    if found.reduction == _NONE:
        return losses
    total = call(_ATEN.sum.default, losses)
    if found.reduction == _SUM:
        return total
    kept = call(_ATEN.ne.Scalar, found.labels, found.ignore_index)
    if found.class_weight is None:
        return call(_ATEN.div.Tensor, total, call(_ATEN.sum.default, kept))
    safe = call(_ATEN.where.ScalarOther, kept, found.labels, 0)
    counts = call(_ATEN.index.Tensor, found.class_weight, [safe])
    counts = call(_ATEN.where.ScalarOther, kept, counts, 0.0)
    return call(_ATEN.div.Tensor, total, call(_ATEN.sum.default, counts))


def _as(call: _Calls, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Losses are computed in a wide dtype, whatever the logits have."""
    return node if wide_of(dtype) is dtype else call(_ATEN.to.dtype, node, dtype)


def _replace(node: fx.Node, other: fx.Node) -> None:
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


class _Calls:
    """Inserts calls before a node; they belong to the module of the product."""

    def __init__(self, graph: fx.Graph, before: fx.Node, found: Found):
        assert found.linear is not None
        self._graph, self._before = graph, before
        kept = ("nn_module_stack", "stack_trace", "source_fn_stack")
        self._meta = {k: found.linear.meta[k] for k in kept if k in found.linear.meta}

    def __call__(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda each: each.meta["val"])
        with torch.no_grad():
            node.meta = {**self._meta, "val": target(*values)}
        return node

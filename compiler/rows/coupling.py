"""Losses of which a row is no part of its own: contrastive ones, batch statistics.

They are another thing in a microbatch than in the batch, whatever microbatches are weighed by.
"""

from __future__ import annotations

from torch import fx

from ..effects.code import user_line
from ..ir.graph import behind, module_path, tensors
from .ways import How, Ways, arguments_of, is_floating, name_of

_NORMS = ("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm")
_ALONG = ("softmax", "log_softmax", "logcumsumexp", "cumsum", "cumprod", "sort", "roll", "flip")
_ATTENTION = "scaled_dot_product_attention"


def coupled(ways: Ways, loss: fx.Node) -> str:
    """Where, in what a loss depends on, rows have a part in each other; "" where they do not.

    What a callable cuts (``cut=``) it takes to be apart: of that only statistics are found. Only
    what is made of rows and weights counts: what the batch gives, such as the length of its
    longest row, may be anything.
    """
    reached = set(behind(loss))
    depends = _depends(ways)
    for node in ways.how:
        if node in reached and node in depends and node not in ways.given:
            why = _couples(ways, node, depends)
            if why:
                return f"{_place(node)} {why}"
    return ""


def _couples(ways: Ways, node: fx.Node, depends: set[fx.Node]) -> str:
    name, dims = name_of(node), ways.dims(node)
    if not dims or not is_floating(node):
        return ""
    arguments = arguments_of(node)
    if name in _NORMS and arguments.get("training"):
        return "takes the statistics of its batch norm over rows"
    if ways.cut:
        return ""
    if len(dims) > 1:
        return f"compares rows with each other ({name}, of shape {list(_shape(node))})"
    operands = [each for each in node.all_input_nodes if each in depends and is_floating(each)]
    first = operands[0] if operands else node
    within = [dim - len(_shape(first)) for dim in ways.dims(first)]
    if name in _ALONG and {dim % max(1, len(_shape(first))) for dim in _along(arguments)} & {
        *ways.dims(first)
    }:
        return f"goes along rows ({name})"
    if name == _ATTENTION and -2 in within:
        return "lets rows attend to each other"
    for each in operands:
        if each not in ways.given and not ways.dims(each) and ways.how[each] is not How.SAME:
            return f"reads what is computed over all rows ({name} of {name_of(each)})"
    return ""


def _along(arguments: dict[str, object]) -> list[int]:
    """The dimensions that an operator works along."""
    given = arguments.get("dim", arguments.get("dims", ()))
    return [given] if isinstance(given, int) else [d for d in given or () if isinstance(d, int)]  # type: ignore[attr-defined]


def _depends(ways: Ways) -> set[fx.Node]:
    """The nodes that depend on the batch."""
    found: set[fx.Node] = set()
    for node in ways.how:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _shape(node: fx.Node) -> tuple[int, ...]:
    return next((tuple(value.shape) for value in tensors(node.meta.get("val"))), ())


def _place(node: fx.Node) -> str:
    path = module_path(node).removeprefix("model").removeprefix(".")
    line = user_line(node)
    return f"module {path!r}" if path else f"the model or loss_fn{f', {line},' if line else ''}"

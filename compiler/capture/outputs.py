"""How the outputs of microbatches become those of the whole batch.

A forward is exported twice, the second time with twice the rows: the dimensions that grow are the
batch's. A result that has none came about by a mean or a sum over rows, or does not depend on them;
which it is, is followed through the operators between. What is none of these is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import fx

from ..ir.graph import tensors
from ..tensors.fakes import is_fake


class How(StrEnum):
    """How results of microbatches are joined."""

    ROWS = "rows"  # one after the other, along a dimension
    MEAN = "mean"  # over microbatches of equal size
    SUM = "sum"
    SAME = "same"  # in every microbatch
    NONE = "none"


@dataclass(frozen=True)
class Output:
    """One tensor of what the model returns.

    Attributes:
        name: its place in the structure.
        dim: along which rows are joined.
        why: why it cannot be joined.
    """

    name: str
    how: How
    dim: int = 0
    why: str = ""


LOSS = "loss"
"""The output that is the loss: that of a batch is the mean over its microbatches."""

_MEANS = ("mean", "nanmean")
_SUMS = ("sum", "nansum")
_LINEAR = (  # each element of the result is a sum of elements, times numbers
    *_MEANS,
    *_SUMS,
    *("neg", "clone", "detach", "alias", "view", "reshape", "squeeze", "unsqueeze", "expand"),
    *("to", "_to_copy", "permute", "transpose", "t", "select", "slice", "contiguous", "flatten"),
    *("stack", "cat", "getitem"),
)
_MEAN_REDUCTION, _SUM_REDUCTION = 1, 2  # of torch's losses


def outputs_of(
    names: Sequence[str],
    results: Sequence[fx.Node],
    doubled: fx.GraphModule,
    single: Callable[[], fx.GraphModule],
) -> tuple[Output, ...]:
    """Per result of a forward.

    Args:
        names: of the results.
        results: nodes that stand for them.
        single, doubled: the graph as exported, with as many rows and with twice as many.
    """
    twice = _returned(doubled)[: len(names)]
    dims = [grown(*pair) for pair in zip(results, twice, strict=True)]
    if all(len(each) == 1 for each in dims):
        return tuple(Output(n, How.ROWS, d) for n, (d,) in zip(names, dims, strict=True))
    alone = single()
    ways = _Ways(alone, doubled)
    pairs = zip(names, _returned(alone), twice, strict=False)
    return tuple(ways.output(*pair) for pair in pairs)


def _returned(graph: fx.GraphModule) -> list[fx.Node]:
    (end,) = graph.graph.find_nodes(op="output")
    found: list[fx.Node] = []
    fx.node.map_arg(end.args, found.append)
    return found


def grown(single: fx.Node, doubled: fx.Node) -> list[int]:
    """The dimensions that are the batch's."""
    one, two = tensors(single.meta.get("val")), tensors(doubled.meta.get("val"))
    found = (
        d
        for a, b in zip(one, two, strict=True)
        for d, (n, m) in enumerate(zip(a.shape, b.shape, strict=True))
        if m == 2 * n != n
    )
    return list(dict.fromkeys(found))


class _Ways:
    """How the values of a graph came about from rows."""

    def __init__(self, single: fx.GraphModule, doubled: fx.GraphModule):
        ours, theirs = list(single.graph.nodes), list(doubled.graph.nodes)
        self.modules = single, doubled
        alike = [str(n.target) for n in ours] == [str(n.target) for n in theirs]
        self.twin = dict(zip(ours, theirs, strict=True)) if alike else {}
        self.how: dict[fx.Node, How] = {}
        for node in self.twin:
            if node.op != "output":
                self.how[node] = self._way(node)

    def output(self, name: str, node: fx.Node, doubled: fx.Node) -> Output:
        dims = grown(node, doubled)
        if len(dims) == 1:
            return Output(name, How.ROWS, dims[0])
        if dims:
            listed = " and ".join(map(str, dims))
            why = f"grows with the batch in dimensions {listed}: a microbatch has only a part of it"
            return Output(name, How.NONE, why=why)
        how = self.how.get(node, How.NONE)
        if how is How.NONE and name == LOSS:
            how = How.MEAN
        if how is not How.NONE:
            return Output(name, how)
        why = "depends on the batch, but neither row by row nor as a mean or a sum over rows"
        return Output(name, How.NONE, why=why)

    def _way(self, node: fx.Node) -> How:
        if grown(node, self.twin[node]):
            return How.ROWS
        if node.op == "placeholder":
            return How.SAME if not node.users or node.meta["val"].dim() == 0 else How.NONE
        if node.op == "get_attr":
            one, two = (operator.attrgetter(str(node.target))(m) for m in self.modules)
            return How.SAME if _alike(one, two) else How.NONE
        kinds = {self.how[source] for source in node.all_input_nodes}
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        if kinds <= {How.SAME}:
            return How.SAME if _constants(node) == _constants(self.twin[node]) else How.NONE
        if How.NONE in kinds:
            return How.NONE
        if How.ROWS in kinds:
            return self._reduced(node, name)
        (kind, *others) = kinds - {How.SAME}
        if others:
            return How.NONE
        if name in _LINEAR:
            return kind
        if name in ("add", "sub"):
            shifted = How.SAME in kinds or bool(_constants(node))
            return How.NONE if shifted and kind is How.SUM else kind
        return self._scaled(node, name, kind)

    def _reduced(self, node: fx.Node, name: str) -> How:
        """What an operator makes of rows that leaves none."""
        schema: Any = getattr(node.target, "_schema", None)
        names = [argument.name for argument in schema.arguments] if schema is not None else []
        if "reduction" in names:
            defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
            given = defaults | dict(zip(names, node.args, strict=False)) | node.kwargs
            ways = {_MEAN_REDUCTION: How.MEAN, _SUM_REDUCTION: How.SUM}
            return ways.get(given["reduction"], How.NONE)
        return How.MEAN if name in _MEANS else How.SUM if name in _SUMS else How.NONE

    def _is(self, argument: Any, kind: How) -> bool:
        return isinstance(argument, fx.Node) and self.how[argument] is kind

    def _scaled(self, node: fx.Node, name: str, kind: How) -> How:
        """Of a product with what is no row's: by the number of rows a sum becomes a mean."""
        if name not in ("mul", "div") or (name == "div" and self._is(node.args[-1], kind)):
            return How.NONE
        here, there = _constants(node), _constants(self.twin[node])
        if here == there:
            return kind
        (rows,), (twice,) = here or (0,), there or (0,)
        ratio = twice / rows if rows else 0
        by_rows = ratio == 2 if name == "div" else ratio == 0.5
        return How.MEAN if by_rows and kind is How.SUM else How.NONE


def _alike(one: Any, two: Any) -> bool:
    """Whether two graphs read the same: state of the model, or equal constants."""
    if not isinstance(one, torch.Tensor) or is_fake(one):
        return True
    try:
        return torch.equal(one, two)
    except RuntimeError:  # of a tensor that has no values, inside a transform of torch.func
        return False


def _constants(node: fx.Node) -> tuple[Any, ...]:
    return tuple(a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float)))


def joined(pieces: list[torch.Tensor], output: Output) -> torch.Tensor:
    """One output from those of the microbatches, which are all on one device."""
    if len(pieces) == 1 or output.how is How.SAME:
        return pieces[0]
    if output.how is How.ROWS:
        return torch.cat(pieces, output.dim)
    total = torch.stack(pieces)
    return total.mean(0) if output.how is How.MEAN else total.sum(0)

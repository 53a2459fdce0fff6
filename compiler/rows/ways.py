"""How the values of a graph came about from the rows of a batch.

A forward is exported twice, the second time with twice the rows: the dimensions that grow are the
batch's. A value that has none came about by a mean or a sum over rows, or does not depend on them;
which it is, is followed through the operators between.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import fx, nn

from ..ir import region
from ..ir.graph import behind, is_getitem, is_operator, is_random, tensors, written
from ..tensors.facts import storage_of
from ..tensors.fakes import is_fake


class How(StrEnum):
    """How results of microbatches are joined."""

    ROWS = "rows"  # one after the other, along a dimension
    MEAN = "mean"  # over microbatches of equal size
    SUM = "sum"
    SAME = "same"  # in every microbatch
    LOSS = "loss"  # as `LossForm` says
    NONE = "none"


MEANS = ("mean", "nanmean")
SUMS = ("sum", "nansum")
LINEAR = (  # each element of the result is a sum of elements, times numbers
    *MEANS,
    *SUMS,
    *("neg", "clone", "detach", "alias", "view", "reshape", "squeeze", "unsqueeze", "expand"),
    *("to", "_to_copy", "permute", "transpose", "t", "select", "slice", "contiguous", "flatten"),
    *("stack", "cat", "getitem", "unbind"),
)
CONTIGUOUS, EXPAND = torch.ops.aten.contiguous.default, torch.ops.aten.expand.default
ANYWHERE = 0  # no address of a storage
_MEAN_REDUCTION, _SUM_REDUCTION = 1, 2  # of torch's losses


class Ways:
    """Of every value of a graph how it came about from rows.

    Args:
        single, doubled: the graph as exported, with as many rows and with twice as many.
        cut: a callable cuts batches (``cut=``), so that what grows is what pieces have some of, in
            any number.

    Attributes:
        how: of each node; empty where the two are not the same operators.
        twin: of each node in the larger graph, which may have more that copy only.
        given: the nodes that the batch alone determines, with constants and buffers.
    """

    def __init__(self, single: fx.GraphModule, doubled: fx.GraphModule, cut: bool = False):
        ours, theirs = list(single.graph.nodes), list(doubled.graph.nodes)
        self.modules, self.cut = (single, doubled), cut
        self.twin = _twins(ours, theirs)
        self.how: dict[fx.Node, How] = {}
        for node in self.twin:
            if node.op != "output":
                self.how[node] = self._way(node)
        self.given = _given(single) if self.twin else set()

    def dims(self, node: fx.Node) -> list[int]:
        """The dimensions of a node's value that are the batch's."""
        return grown(node, self.twin[node], self.cut)

    def _way(self, node: fx.Node) -> How:
        if self.dims(node):
            return How.ROWS
        if node.op == "placeholder":
            return How.SAME if not node.users or node.meta["val"].dim() == 0 else How.NONE
        if node.op == "get_attr":
            one, two = (operator.attrgetter(str(node.target))(m) for m in self.modules)
            return How.SAME if _alike(one, two) else How.NONE
        kinds = {self.how[source] for source in node.all_input_nodes}
        name = name_of(node)
        if kinds <= {How.SAME}:
            return How.SAME if numbers_of(node) == numbers_of(self.twin[node]) else How.NONE
        if How.NONE in kinds:
            return How.NONE
        if How.ROWS in kinds:
            return _reduced(node, name)
        (kind, *others) = kinds - {How.SAME}
        if others:
            return How.NONE
        if name in LINEAR:
            return kind
        if name in ("add", "sub"):
            shifted = How.SAME in kinds or bool(numbers_of(node))
            return How.NONE if shifted and kind is How.SUM else kind
        return self._scaled(node, name, kind)

    def _is(self, argument: Any, kind: How) -> bool:
        return isinstance(argument, fx.Node) and self.how[argument] is kind

    def _scaled(self, node: fx.Node, name: str, kind: How) -> How:
        """Of a product with what is no row's: by the number of rows a sum becomes a mean."""
        if name not in ("mul", "div") or (name == "div" and self._is(node.args[-1], kind)):
            return How.NONE
        if name == "mul" and all(self._is(each, kind) for each in node.args):
            return How.NONE
        here, there = numbers_of(node), numbers_of(self.twin[node])
        if here == there:
            return kind
        (rows,), (twice,) = here or (0,), there or (0,)
        ratio = twice / rows if rows else 0
        by_rows = ratio == 2 if name == "div" else ratio == 0.5
        return How.MEAN if by_rows and kind is How.SUM else How.NONE


def _twins(ours: Sequence[fx.Node], theirs: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Nodes of one graph -> those of another with more rows; empty where they are not the same
    operators.

    Of one row less is done: it lies in memory as ``contiguous`` wants it, and what all rows have in
    common is as wide as the batch. So an operator that only copies counts as what it copies, and
    one that only expands what no batch has a part in, if all that reads it has rows too.
    """
    if list(map(_target, ours)) == list(map(_target, theirs)):
        return dict(zip(ours, theirs, strict=True))
    found: dict[fx.Node, fx.Node] = {}
    source_of: dict[fx.Node, fx.Node] = {}  # of operators that are there with more rows only
    wider: set[fx.Node] = set()
    changed = _places([each for node in theirs for each in written(node)])
    others = iter(theirs)
    for node in ours:
        sources = [found[source] for source in node.all_input_nodes]
        for other in others:
            given = [source_of.get(source, source) for source in other.all_input_nodes]
            if _target(node) == _target(other) and sources == given:
                found[node] = other
                break
            if len(given) != 1 or not _apart(changed, _places([other, *given])):
                return {}
            if other.target is EXPAND and all(each.op != "placeholder" for each in behind(other)):
                wider.add(other)
            elif other.target is not CONTIGUOUS:
                return {}
            source_of[other] = given[0]
            wider |= {other} if wider.intersection(other.all_input_nodes) else set()
        else:
            return {}
    reading = ((a, b) for a, b in found.items() if wider.intersection(b.all_input_nodes))
    return found if all(grown(a, b) for a, b in reading) else {}


def grown(single: fx.Node, doubled: fx.Node, cut: bool = False) -> list[int]:
    """The dimensions that are the batch's."""
    one, two = tensors(single.meta.get("val")), tensors(doubled.meta.get("val"))
    found = (
        d
        for a, b in zip(one, two, strict=True)
        for d, (n, m) in enumerate(zip(a.shape, b.shape, strict=True))
        if isinstance(n, int) and isinstance(m, int) and (m != n if cut else m == 2 * n != n)
    )
    return list(dict.fromkeys(found))


def returned(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes that a graph returns."""
    (end,) = graph.graph.find_nodes(op="output")
    found: list[fx.Node] = []
    fx.node.map_arg(end.args, found.append)
    return found


def alike(single: fx.Node, other: fx.Node) -> dict[fx.Node, fx.Node]:
    """Nodes behind one of another graph -> those behind this one, as far as both are made alike."""
    found: dict[fx.Node, fx.Node] = {}
    pending = [(single, other)]
    while pending:
        mine, theirs = pending.pop()
        if theirs in found or _kind(mine) != _kind(theirs):
            continue
        found[theirs] = mine
        pending += zip(mine.all_input_nodes, theirs.all_input_nodes, strict=True)
    return found


def _kind(node: fx.Node) -> tuple[Any, ...]:
    return node.op, _target(node), len(node.all_input_nodes)


def _target(node: fx.Node) -> str:
    """An operator by its name; calls of `torch.autograd.Function` have their own objects, and
    regions names with the shape that they were tried with."""
    return re.sub(" at 0x[0-9a-f]+", "", region.alike(str(node.target)))


def name_of(node: fx.Node) -> str:
    """Of an operator, without its overload, nor the sign that it works in place."""
    return getattr(node.target, "__name__", str(node.target)).split(".")[0].removesuffix("_")


def numbers_of(node: fx.Node) -> tuple[Any, ...]:
    return tuple(a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float)))


def is_floating(node: fx.Node) -> bool:
    return any(value.is_floating_point() for value in tensors(node.meta.get("val")))


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Of an operator of torch's, by their names, those that are not given with their defaults."""
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    names = (argument.name for argument in schema.arguments)
    return defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _reduced(node: fx.Node, name: str) -> How:
    """What an operator makes of rows that leaves none."""
    arguments = arguments_of(node)
    if "reduction" in arguments:
        ways = {_MEAN_REDUCTION: How.MEAN, _SUM_REDUCTION: How.SUM}
        return ways.get(arguments["reduction"], How.NONE)
    return How.MEAN if name in MEANS else How.SUM if name in SUMS else How.NONE


def _alike(one: Any, two: Any) -> bool:
    """Whether two graphs read the same: state of the model, or equal constants."""
    if not isinstance(one, torch.Tensor) or is_fake(one):
        return True
    try:
        return torch.equal(one, two)
    except RuntimeError:  # of a tensor that has no values, inside a transform of torch.func
        return False


def _given(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes that are made of the batch, constants and buffers alone.

    What an operator writes into from elsewhere is none, nor are its views; nor is a buffer that is
    updated.
    """
    found: set[fx.Node] = set()
    changed: set[int] = set()
    updated = _places([each for node in graph.graph.nodes for each in written(node)])
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            found.add(node)
        elif node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(graph)
            if not isinstance(value, nn.Parameter) and _apart(updated, _places([node])):
                found.add(node)
        elif node.op == "call_function":
            known = found.issuperset(node.all_input_nodes) and _is_plain(node)
            known = known and _apart(changed, _places(node.all_input_nodes))
            if known:
                found.add(node)
            else:
                changed |= _places(written(node))
    return found


def _is_plain(node: fx.Node) -> bool:
    """Whether an operator gives the same for the same operands."""
    return is_getitem(node) or (is_operator(node) and not is_random(node))


def _places(nodes: Sequence[fx.Node]) -> set[int]:
    """Where in memory their values are; `ANYWHERE` for one that does not tell."""
    values = (value for node in nodes for value in tensors(node.meta.get("val")))
    return set(map(_place, values))


def _place(value: torch.Tensor) -> int:
    try:
        return storage_of(value)
    except NotImplementedError:  # inside a transform of torch.func
        return ANYWHERE


def _apart(written_to: set[int], places: set[int]) -> bool:
    if ANYWHERE in written_to | places:
        return not (written_to and places)
    return written_to.isdisjoint(places)

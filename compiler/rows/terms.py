"""Of what a loss is the sum, and over what each part is a mean.

A mean over the labels that are kept has in every microbatch another denominator. Where the batch
alone gives it (labels, a mask), it can be counted before anything runs, and microbatches be weighed
by it: so the sum over all of them is the loss of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from torch import fx

from ..ir.graph import tensors
from .ways import LINEAR, How, Ways, arguments_of, is_floating, name_of, numbers_of

_CROSS_ENTROPIES = ("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d")
_SUM = 2  # torch's ``reduction``


class Way(StrEnum):
    """How a term of the batch comes of those of the microbatches."""

    KEPT = "kept"  # the mean over what is counted
    ROWS = "rows"  # the mean over rows, or over elements of which each row has as many
    SUM = "sum"
    SAME = "same"  # in every microbatch: a penalty on weights
    OWN = "own"  # unknown: each microbatch has its own, and their mean is taken


@dataclass(frozen=True)
class Count:
    """What the mean of a microbatch is divided by; only nodes that the batch alone determines.

    Attributes:
        node: the count itself; or labels, of which those that are not ``ignored`` count.
        divisor: what the sum is divided by in the graph; None where an operator counts labels.
        weight: of each class, if labels count by it.
        smooths: whether labels are smoothed, so that a loss without any has no gradient but NaN.
        floor, more: what is divided by is ``max(count, floor) + more``.
        by_rows: it is a mean over rows itself.
    """

    node: fx.Node
    divisor: fx.Node | None = None
    ignored: int | None = None
    weight: fx.Node | None = None
    smooths: bool = False
    floor: float = 0.0
    more: float = 0.0
    by_rows: bool = False


@dataclass(frozen=True)
class Size:
    """How many elements a mean is over, where a callable cuts the batch.

    Attributes:
        node: the value that is averaged, or what divides a sum by that number.
        dims: of the value, those of which there is one for each element; none of a number.
    """

    node: fx.Node
    dims: tuple[int, ...] = ()

    @property
    def number(self) -> Any:
        """A symbol in a graph for all sizes."""
        if self.dims:
            (value,) = tensors(self.node.meta["val"])
            return math.prod(value.shape[dim] for dim in self.dims)
        by = self.node.args[1]
        return by.meta["val"] if isinstance(by, fx.Node) else by


@dataclass(frozen=True)
class Term:
    """A part of the loss.

    Attributes:
        node: its value.
        count: what its mean is over; of a sum what it is over, where that is known.
        by: the whole number of the batch that a sum is divided by.
        why: what it is that is not known; of `Way.OWN`.
        size: of `Way.ROWS`, where a callable cuts the batch.
    """

    node: fx.Node
    way: Way
    count: Count | None = None
    by: fx.Node | None = None
    why: str = ""
    size: Size | None = None

    def moved(self, twin: Mapping[fx.Node, fx.Node]) -> Term:
        """The same of another graph."""
        size = self.size and replace(self.size, node=twin[self.size.node])
        count = self.count
        if count is not None:
            divisor, weight = (each and twin[each] for each in (count.divisor, count.weight))
            count = replace(count, node=twin[count.node], divisor=divisor, weight=weight)
        by = self.by and twin[self.by]
        return replace(self, node=twin[self.node], count=count, by=by, size=size)


def terms_of(ways: Ways, loss: fx.Node) -> list[Term]:
    """The terms that a loss is a linear combination of, in the order of the graph."""
    found = dict.fromkeys(_split(ways, loss))
    order = {node: i for i, node in enumerate(ways.how)}
    return sorted(found, key=lambda term: order[term.node])


def _split(ways: Ways, node: fx.Node, by: fx.Node | None = None) -> Iterator[Term]:
    """The terms of a value, which all of it is divided ``by``."""
    if ways.how[node] is How.SAME:
        yield Term(node, Way.SAME)
        return
    parts, name = _parts(ways, node), name_of(node)
    if not parts:
        term = _term(ways, node)
        yield replace(term, by=by) if term.way is Way.SUM else term
        return
    if name in ("add", "sub", "rsub") and numbers_of(node):
        yield Term(node, Way.SAME)
    number = node.args[1] if name == "div" else None
    if isinstance(number, fx.Node) and number in ways.given and not is_floating(number):
        by = number
    for part in parts:
        yield from _split(ways, part, by)


def _parts(ways: Ways, node: fx.Node) -> list[fx.Node]:
    """The operands of which a value is a linear combination; none where it is no such thing, or
    made of rows."""
    operands = node.all_input_nodes
    if not operands or any(ways.how[each] is How.ROWS for each in operands):
        return []
    name = name_of(node)
    if name in LINEAR or name in ("add", "sub", "rsub"):
        return operands
    if name == "mul":
        given = [each for each in node.args if isinstance(each, fx.Node)]  # one may be there twice
        varying = [each for each in given if ways.how[each] is not How.SAME]
        return varying if len(varying) == 1 and _same_numbers(ways, node) else []
    if name == "div":
        by = node.args[1]
        constant = not isinstance(by, fx.Node) or ways.how[by] is How.SAME
        return [node.all_input_nodes[0]] if constant and _same_numbers(ways, node) else []
    return []


def _same_numbers(ways: Ways, node: fx.Node) -> bool:
    return numbers_of(node) == numbers_of(ways.twin[node])


def _term(ways: Ways, node: fx.Node) -> Term:
    name = name_of(node)
    if name in _CROSS_ENTROPIES:
        return _cross_entropy(ways, node)
    if name == "div" and isinstance(node.args[1], fx.Node):
        return _quotient(ways, node, node.args[1])
    if ways.how[node] is How.MEAN:
        return _mean(ways, node)
    if ways.how[node] is How.SUM:
        return Term(node, Way.SUM)
    return Term(node, Way.OWN, why=f"{name} is neither a mean nor a sum over rows")


def _mean(ways: Ways, node: fx.Node) -> Term:
    """Over rows; where a callable cuts the batch, over so many elements as the graph says."""
    if not ways.cut:
        return Term(node, Way.ROWS)
    size, name = None, name_of(node)
    over = [each for each in node.all_input_nodes if ways.dims(each)]
    if name == "div":
        size = Size(node)
    elif name in _CROSS_ENTROPIES or (
        name != "nanmean" and len({tuple(each.meta["val"].shape) for each in over}) == 1
    ):
        size = Size(over[0], tuple(ways.dims(over[0])))
    if size is None:
        return Term(node, Way.OWN, why=f"over what {name} is a mean")
    twin = Size(ways.twin[size.node], size.dims)
    if twin.number != 2 * size.number:
        why = f"{name} is a mean over elements of which pieces do not have as many as the batch"
        return Term(node, Way.OWN, why=why)
    return Term(node, Way.ROWS, size=size)


def _cross_entropy(ways: Ways, node: fx.Node) -> Term:
    arguments = arguments_of(node)
    labels, weight = arguments["target"], arguments.get("weight")
    summed = arguments["reduction"] == _SUM
    known = ways.given.issuperset({labels} | ({weight} if weight is not None else set()))
    if is_floating(labels):  # probabilities, of which none is ignored
        return Term(node, Way.SUM) if summed else _mean(ways, node)
    if not known and not summed:
        return Term(node, Way.OWN, why=f"the labels of {name_of(node)} are made by the model")
    smooths = bool(arguments.get("label_smoothing", 0.0))
    count = Count(labels, None, arguments["ignore_index"], weight, smooths) if known else None
    return Term(node, Way.SUM if summed else Way.KEPT, count)


def _quotient(ways: Ways, node: fx.Node, by: fx.Node) -> Term:
    inner, floor, more = _bare(by)
    over = node.args[0]
    assert isinstance(over, fx.Node)
    summed = ways.how[over] is How.SUM and ways.how[inner] is How.SUM
    averaged = ways.how[over] is How.MEAN and ways.how[inner] is How.MEAN and not ways.cut
    if inner not in ways.given or not (summed or (averaged and not floor and not more)):
        return Term(node, Way.OWN, why="it divides by what is no sum over rows of the batch")
    return Term(node, Way.KEPT, Count(inner, by, floor=floor, more=more, by_rows=averaged))


def _bare(node: fx.Node) -> tuple[fx.Node, float, float]:
    """A denominator without what keeps it from zero: ``max(bare, floor) + more``."""
    floor, more, name = 0.0, 0.0, name_of(node)
    if name == "add" and len(node.all_input_nodes) == 1 and numbers_of(node):
        more = float(numbers_of(node)[0])
        node = node.all_input_nodes[0]
        name = name_of(node)
    arguments = arguments_of(node)
    lowest: Any = arguments.get("min")
    if name in ("clamp", "clamp_min") and lowest is not None and arguments.get("max") is None:
        floor = float(lowest)
        node = node.all_input_nodes[0]
    while name_of(node) in ("to", "_to_copy", "clone", "detach") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node, floor, more

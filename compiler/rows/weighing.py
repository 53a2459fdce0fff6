"""A forward graph -> one whose microbatches can be weighed: counts come out, shares go in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .loss import Weighing
from .terms import Count, Size, Term, Way

aten = torch.ops.aten


@dataclass(frozen=True)
class Weighed:
    """What was made of a graph.

    Attributes:
        terms: as `LossForm` has them.
        counts: how many results follow those that were there.
        shares: the dtypes of the 0-dim arguments that follow those that were there.
        sizes: numbers that are counts too, and come before the others.
    """

    terms: tuple[Weighing, ...]
    counts: int
    shares: tuple[torch.dtype, ...]
    sizes: tuple[Any, ...] = ()


UNWEIGHED = Weighed((Weighing(Way.OWN),), 0, ())
"""A graph that stays as it is."""


def weigh(module: fx.GraphModule, terms: Sequence[Term]) -> Weighed:
    """Rewrite a graph in place.

    Where all terms are weighed alike, the gradient of the whole loss is multiplied, and the graph
    stays as it is; else each term is multiplied by a share of its own. A microbatch in which
    nothing counts has a loss of zero instead of 0/0 where its gradients would be NaN.
    """
    counts: dict[Hashable, tuple[Count, fx.Node]] = {}
    shared = [term for term in terms if term.way not in (Way.SAME, Way.OWN)]
    sizes = list(dict.fromkeys(term.size for term in shared if term.size is not None))
    weighings = [_weighing(term, sizes, counts) for term in shared]
    numbers = tuple(size.number for size in sizes)
    factored = len(set(weighings)) > 1 or (bool(shared) and _stands_beside(terms))
    edit = _Edit(module)
    edit.give([edit.count(*each) for each in counts.values()])
    for term in shared:
        if term.count is not None and term.way is Way.KEPT:
            edit.guard(term.node, term.count, factored)
    if factored:
        shares = tuple(edit.share(term.node, i) for i, term in enumerate(shared))
        return Weighed(tuple(weighings), len(counts), shares, numbers)
    unknown = any(term.way is Way.OWN for term in terms)
    (one,) = set(weighings) or {Weighing(Way.OWN if unknown else Way.ROWS)}
    return Weighed((one,), len(counts), (), numbers)


def _stands_beside(terms: Sequence[Term]) -> bool:
    """Whether terms are added that do not go by the weights of the others."""
    ways = {term.way for term in terms}
    return Way.OWN in ways or {Way.SAME, Way.SUM} <= ways


def _weighing(
    term: Term, sizes: Sequence[Size], counts: dict[Hashable, tuple[Count, fx.Node]]
) -> Weighing:
    def number(count: Count | None, before: fx.Node) -> int:
        if count is None:
            return -1
        key = count.node, count.ignored, count.weight
        counts.setdefault(key, (count, before))
        return len(sizes) + list(counts).index(key)

    if term.size is not None:
        return Weighing(Way.KEPT, sizes.index(term.size))
    count = term.count
    if term.way is Way.SUM and term.by is not None:
        by = number(Count(term.by), term.by.next)
        return Weighing(term.way, number(count, term.node), by=by)
    if count is None or term.way is Way.SUM:
        return Weighing(term.way)
    return Weighing(term.way, number(count, term.node), count.floor, count.more, count.by_rows)


class _Edit:
    """A graph that nodes are inserted into."""

    def __init__(self, module: fx.GraphModule):
        self.module, self.graph = module, module.graph
        self.graph.set_codegen(fx.graph.CodeGen())  # arguments and results are flat already

    def guard(self, term: fx.Node, count: Count, factored: bool) -> None:
        """Keep what a term is divided by from zero, where its gradient would be NaN."""
        if count.divisor is not None:
            if count.floor <= 0 and count.more <= 0:
                with self._before(term) as call:
                    empty = call(aten.eq.Scalar, count.divisor, 0)
                    safe = call(aten.where.ScalarSelf, empty, 1, count.divisor)
                term.replace_input_with(count.divisor, safe)
        elif count.ignored is not None and (factored or count.smooths):
            with self._before(term) as call:
                kept = call(aten.ne.Scalar, count.node, count.ignored)
                some = call(aten.any.default, kept)
                safe = call(aten.where.ScalarOther, some, count.node, 0)
            term.replace_input_with(count.node, safe)

    def count(self, count: Count, before: fx.Node) -> fx.Node:
        """A node of the number of what a term keeps, as it is before a node."""
        with self._before(before) as call:
            if count.ignored is None:
                return call(aten.sum.default, count.node)
            kept = call(aten.ne.Scalar, count.node, count.ignored)
            if count.weight is None:
                return call(aten.sum.default, kept)
            labels = call(aten.where.ScalarOther, kept, count.node, 0)
            weights = call(aten.index.Tensor, count.weight, [labels])
            return call(aten.sum.default, call(aten.where.ScalarOther, kept, weights, 0.0))

    def give(self, nodes: Sequence[fx.Node]) -> None:
        """Return these too."""
        (end,) = self.graph.find_nodes(op="output")
        end.args = ((*end.args[0], *nodes),)

    def share(self, node: fx.Node, number: int) -> torch.dtype:
        """Multiply a term by a new argument, as exact as float32 at least; its dtype."""
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            share = self.graph.placeholder(f"share_{number}")
        given: torch.dtype = node.meta["val"].dtype
        dtype = torch.promote_types(given, torch.float32)
        share.meta["val"] = node.meta["val"].detach().to(dtype)
        readers = list(node.users)
        with self._after(node) as call:
            product = call(aten.mul.Tensor, node, share)
            if dtype is not given:
                product = call(aten.to.dtype, product, given)
        for reader in readers:
            reader.replace_input_with(node, product)
        return dtype

    # -- inserting ------------------------------------------------------------------------------

    def _after(self, node: fx.Node) -> _Inserting:
        return _Inserting(self.graph, node.next, node)

    def _before(self, node: fx.Node) -> _Inserting:
        return _Inserting(self.graph, node, node)


class _Inserting:
    """Makes calls before a node; they belong to the module of another."""

    def __init__(self, graph: fx.Graph, before: fx.Node, like: fx.Node):
        self._at, self._graph, self._like = graph.inserting_before(before), graph, like

    def __enter__(self) -> Callable[..., fx.Node]:
        self._at.__enter__()
        return self._call

    def __exit__(self, *raised: Any) -> None:
        self._at.__exit__(*raised)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        node = self._graph.call_function(target, args)
        kept = ("nn_module_stack", "stack_trace", "source_fn_stack")
        node.meta = {key: self._like.meta[key] for key in kept if key in self._like.meta}
        values = fx.node.map_arg(args, lambda each: each.meta["val"])
        with torch.no_grad():
            node.meta["val"] = target(*values)
        return node

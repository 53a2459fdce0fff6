"""A forward graph without layers that do what the one before them did, to tell its loss by.

What a layer makes of rows depends on nothing but what its operands are. So where one has made of a
value another that is the same way (`ways.How`), has the batch in the same dimensions, and is the
batch's alone or not, all that follow and are like it go on so, and the loss is told without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from ..ir.graph import module_path
from .ways import Ways


@dataclass(frozen=True)
class Fewer:
    """A graph without some layers.

    Attributes:
        module: what is left.
        moved: its nodes -> those of the whole graph.
        before, after: what the layer is given that stands for those left out, and what it returns.
    """

    module: fx.GraphModule
    moved: dict[fx.Node, fx.Node]
    before: fx.Node
    after: fx.Node

    def ways(self, doubled: fx.GraphModule) -> Ways | None:
        """How its values came about; None where that does not tell how those of the whole did.

        Args:
            doubled: the same with twice the rows.
        """
        try:
            ways = Ways(self.module, doubled)
        except ValueError:
            return None
        one, two = self.before, self.after
        goes_on = (
            bool(ways.how)
            and ways.how[one] is ways.how[two]
            and bool(ways.dims(one))
            and ways.dims(one) == ways.dims(two)
            and (one in ways.given) == (two in ways.given)
        )
        return ways if goes_on else None


def without(traced: fx.GraphModule, first: str, kept: str, paths: Sequence[str]) -> Fewer | None:
    """A graph without some layers; None where anything else reads what they make.

    Args:
        first, kept: the paths of two layers that follow each other; the second one stands for
            those that are left out.
        paths: of those, in their order.
    """
    places = {path: i for i, path in enumerate((first, kept, *paths))}
    layer_of = {node: place for node in traced.graph.nodes if (place := _place(node, places)) >= 0}
    results: list[fx.Node] = []
    for i in range(len(places)):
        inside = [node for node, place in layer_of.items() if place == i]
        read = [n for n in inside if any(layer_of.get(user) != i for user in n.users)]
        if len(read) != 1:
            return None
        results += read
    for i, result in enumerate(results[:-1]):
        outside = {layer_of.get(user) for user in result.users} - {i}
        if outside != {i + 1}:
            return None
    graph, twin = fx.Graph(), dict[fx.Node, fx.Node]()

    def moved(node: fx.Node) -> fx.Node:
        return twin[results[1] if node is results[-1] else node]

    for node in traced.graph.nodes:
        reads = [layer_of.get(user, -1) for user in node.users]
        gone = node.op == "get_attr" and bool(reads) and all(place > 1 for place in reads)
        if not gone and layer_of.get(node, -1) <= 1:
            twin[node] = graph.node_copy(node, moved)
            twin[node].meta = node.meta
    made = fx.GraphModule(traced, graph)
    back = {mine: theirs for theirs, mine in twin.items()}
    return Fewer(made, back, twin[results[0]], twin[results[1]])


def _place(node: fx.Node, places: dict[str, int]) -> int:
    """Which of the layers made a node; -1 for none."""
    if node.op != "call_function":
        return -1
    path = module_path(node)
    while path:
        if path in places:
            return places[path]
        path = path.rpartition(".")[0]
    return -1

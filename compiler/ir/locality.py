"""Which values belong to one stage, and which every stage can make for itself.

constant  the same for every microbatch of every step: made from buffers and literals
free      made from the batch and constants alone (masks, position ids, rotary tables), or a mere
          view of a parameter; copied into each stage that reads it instead of being sent
staged    everything else, and what is read of a buffer that forward updates: it is computed on
          exactly one stage
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from .graph import (
    JointGraph,
    Phase,
    is_getitem,
    is_latest,
    is_random,
    phase_of,
    storage_root,
)


@dataclass(frozen=True)
class Locality:
    """The three kinds of nodes of a graph; constants are free as well."""

    constant: frozenset[fx.Node]
    free: frozenset[fx.Node]
    staged: tuple[fx.Node, ...]

    def moved(self, twin: Mapping[fx.Node, fx.Node]) -> Locality:
        """The same of a copy of the graph."""
        constant = frozenset(twin[node] for node in self.constant)
        free = frozenset(twin[node] for node in self.free)
        return Locality(constant, free, tuple(twin[node] for node in self.staged))


def locality_of(graph: JointGraph) -> Locality:
    params = graph.owners
    mutated = {graph.buffers[name] for name in graph.mutations if name in graph.buffers}
    inputs = set(graph.inputs.values())
    constant = set(graph.buffers.values()) - mutated
    free = constant | mutated | inputs
    views: set[fx.Node] = set()  # of parameters: what is computed of them is staged
    staged: list[fx.Node] = []
    for node in graph.ops():
        sources = node.all_input_nodes
        if is_latest(node):
            staged.append(node)
        elif all(source in constant for source in sources) and not is_random(node):
            constant.add(node)
            free.add(node)
        elif storage_root(node) in params:
            free.add(node)
            views.add(node)
        elif all(source in free and source not in views for source in sources):
            free.add(node)
        else:
            staged.append(node)
    return Locality(frozenset(constant), frozenset(free), tuple(staged))


def backward_places(
    graph: JointGraph, locality: Locality, forward: dict[fx.Node, int]
) -> dict[fx.Node, int]:
    """Extend a numbering of the staged forward nodes (units, stages) to the backward nodes.

    A backward node goes where the forward op with its sequence number is. Where autograd adds
    up the gradients of a value with several readers, the sum goes to the lowest operand: partial
    sums travel with the pipeline, and the order of additions stays autograd's.
    """
    partner: dict[int, int] = {}
    for node, place in forward.items():
        key = node.meta["partner"]
        partner[key] = max(partner.get(key, place), place)
    places = dict(forward)
    last = max(forward.values(), default=0)
    for node in locality.staged:
        if phase_of(node) is not Phase.BACKWARD:
            continue
        operands = [
            places[source]
            for source in node.all_input_nodes
            if source in places and phase_of(source) is Phase.BACKWARD
        ]
        lowest = min(operands, default=last)
        if is_getitem(node) or is_gradient_sum(node):
            places[node] = lowest
        else:
            places[node] = min(partner.get(node.meta["partner"], lowest), lowest)
    return places


def is_gradient_sum(node: fx.Node) -> bool:
    """Whether a backward node adds two gradients, as autograd does for a value read twice."""
    return (
        phase_of(node) is Phase.BACKWARD
        and "recomputes" not in node.meta
        and str(node.target) == "aten.add.Tensor"
        and len(node.args) == 2
        and not node.kwargs
        and all(
            isinstance(a, fx.Node) and phase_of(a) is Phase.BACKWARD and "recomputes" not in a.meta
            for a in node.args
        )
    )


def gradient_sums(graph: JointGraph) -> set[fx.Node]:
    """The sums that make the gradients of parameters."""
    found: set[fx.Node] = set()
    pending = list(graph.grads.values())
    while pending:
        node = pending.pop()
        if is_gradient_sum(node) and node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def awaited(nodes: Sequence[fx.Node], place: Mapping[fx.Node, int]) -> set[fx.Node]:
    """Of nodes in execution order, those on which something in another place depends; users
    without a place do not count."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        users = [user for user in node.users if user in place]
        if any(user in found or place[user] != place[node] for user in users):
            found.add(node)
    return found

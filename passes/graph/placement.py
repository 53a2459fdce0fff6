"""The stage of every staged node: from a partition of units, or carried over to another graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from ...compiler.ir.errors import PartitionError
from ...compiler.ir.graph import JointGraph, Phase, module_of, phase_of, storage_root
from ...compiler.ir.locality import Locality, backward_places

Site = tuple[str, str, int]
"""(module, operator, how many of these ran before): where in the model a node is."""


@dataclass(frozen=True)
class Placement:
    """Stage of every staged node of one graph, and by site for the other graphs of the model."""

    stage: dict[fx.Node, int]
    sites: dict[Site, int]


def place(graph: JointGraph, locality: Locality, forward: Mapping[fx.Node, int]) -> Placement:
    """Put the backward nodes where their forward partners are.

    Args:
        forward: the stage of every staged forward node.
    """
    sites = {site: forward[node] for node, site in sites_of(locality)}
    return Placement(backward_places(graph, locality, dict(forward)), sites)


def follow(
    graph: JointGraph,
    locality: Locality,
    sites: Mapping[Site, int],
    homes: Mapping[str, Collection[int]],
) -> Placement:
    """Put another graph of the same model (other shapes, evaluation) on the same stages.

    Args:
        sites: the stages chosen for the first graph.
        homes: parameter FQN -> the stages that hold it.

    Raises:
        PartitionError: the graph differs so much that a parameter would be read on a stage
            that does not hold it.
    """
    forward: dict[fx.Node, int] = {}
    owner = graph.owners
    for node, site in sites_of(locality):
        lowest = max((forward[a] for a in node.all_input_nodes if a in forward), default=0)
        names = [owner[root] for a in node.all_input_nodes if (root := storage_root(a)) in owner]
        wanted = max(sites.get(site, lowest), lowest)
        if any(wanted not in homes[name] for name in names):
            shared = set.intersection(*(set(homes[name]) for name in names))
            wanted = min((s for s in shared if s >= lowest), default=-1)
            if wanted < 0:
                raise PartitionError(
                    f"in this mode or batch shape, {module_of(node) or 'the model'} reads "
                    f"{', '.join(names)} at another point than when the stages were chosen: "
                    "compile a pipeline of its own for it"
                )
        forward[node] = wanted
    return Placement(backward_places(graph, locality, forward), dict(sites))


def sites_of(locality: Locality) -> Iterator[tuple[fx.Node, Site]]:
    """Every staged forward node with its site."""
    seen: dict[tuple[str, str], int] = {}
    for node in locality.staged:
        if phase_of(node) is Phase.FORWARD:
            key = (module_of(node), str(node.target))
            seen[key] = seen.get(key, -1) + 1
            yield node, (*key, seen[key])

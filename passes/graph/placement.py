"""The stage of every staged node: from a partition of units, or carried over to another graph."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ...compiler.ir.errors import PartitionError
from ...compiler.ir.graph import (
    JointGraph,
    Phase,
    is_getitem,
    is_latest,
    module_of,
    phase_of,
    storage_root,
)
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
    lowest: dict[fx.Node, int] = {}
    while True:
        forward = _followed(graph, locality, sites, homes, lowest)
        pairs = [(n, graph.mutations[n.meta["latest"]]) for n in forward if is_latest(n)]
        apart = [(a, b) for a, b in pairs if b in forward and forward[a] != forward[b]]
        if not apart:
            break
        for pair in apart:  # a buffer is read where it is updated
            lowest |= dict.fromkeys(map(_whole, pair), max(forward[node] for node in pair))
    return Placement(backward_places(graph, locality, forward), dict(sites))


def _followed(
    graph: JointGraph,
    locality: Locality,
    sites: Mapping[Site, int],
    homes: Mapping[str, Collection[int]],
    at_least: Mapping[fx.Node, int],
) -> dict[fx.Node, int]:
    forward: dict[fx.Node, int] = {}
    owner = graph.owners
    reads = {
        node: [owner[root] for a in node.all_input_nodes if (root := storage_root(a)) in owner]
        for node, _ in sites_of(locality)
    }
    possible = {node: _holders(names, homes) for node, names in reads.items()}
    highest = _highest(possible, reads)
    for node, site in sites_of(locality):
        if is_getitem(node):
            forward[node] = forward[_whole(node)]
            continue
        sources = (forward[a] for a in node.all_input_nodes if a in forward)
        lowest = max(at_least.get(node, 0), *sources, 0)
        wanted = max(min(sites.get(site, lowest), highest[node]), lowest)
        if is_latest(node):
            wanted = lowest  # where the first graph read it says nothing about this one
        holders = possible[node]
        if holders is not None and wanted not in holders:
            wanted = min((s for s in holders if s >= wanted), default=-1)
            if wanted < 0:
                raise _astray(node, reads[node])
        forward[node] = wanted
    return forward


def _whole(node: fx.Node) -> fx.Node:
    """The operator that makes a value, of several perhaps."""
    while is_getitem(node):
        node = node.all_input_nodes[0]
    return node


def _astray(node: fx.Node, names: Sequence[str]) -> PartitionError:
    return PartitionError(
        f"in this mode or batch shape, {module_of(node) or 'the model'} reads {', '.join(names)} "
        "at another point than when the stages were chosen: compile a pipeline of its own for it"
    )


def _holders(names: Sequence[str], homes: Mapping[str, Collection[int]]) -> set[int] | None:
    """The stages that hold all of some parameters; None for no parameters: all."""
    return set.intersection(*(set(homes[name]) for name in names)) if names else None


def _highest(
    possible: Mapping[fx.Node, set[int] | None], reads: Mapping[fx.Node, Sequence[str]]
) -> dict[fx.Node, int]:
    """Per forward node the last stage from which all that depends on it still finds its
    parameters: operators of another branch may share a site with those of a later one."""
    highest: dict[fx.Node, int] = {}
    for node in reversed(list(possible)):
        limit = min((highest[user] for user in node.users if user in highest), default=sys.maxsize)
        holders = possible[node]
        if holders is not None:
            limit = max((s for s in holders if s <= limit), default=-1)
            if limit < 0:
                raise _astray(node, reads[node])
        highest[node] = limit
    return highest


def sites_of(locality: Locality) -> Iterator[tuple[fx.Node, Site]]:
    """Every staged forward node with its site."""
    seen: dict[tuple[str, str], int] = {}
    for node in locality.staged:
        if phase_of(node) is Phase.FORWARD:
            read = f"{node.meta['latest']} " if is_latest(node) else ""
            key = (module_of(node), f"{read}{node.target}")
            seen[key] = seen.get(key, -1) + 1
            yield node, (*key, seen[key])

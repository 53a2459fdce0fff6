"""Rematerialisation: chosen forward values are computed again in the backward instead of kept.

Each is copied once, right before the first node that needs it, on the stage where both the
forward and that reader are. Readers on other stages go on reading the forward value, which is
sent to them. Copies are the same operators on the same inputs, so every bit stays the same.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from ...compiler.ir.graph import JointGraph, Phase, phase_of, storage_root
from ...compiler.ir.locality import Locality


@dataclass(frozen=True)
class Remat:
    """A graph with recomputation in it.

    Attributes:
        locality, stage: of all its nodes, copies included.
        copies: copy -> the forward node that it computes again.
    """

    locality: Locality
    stage: dict[fx.Node, int]
    copies: dict[fx.Node, fx.Node]


def rematerialise(
    graph: JointGraph,
    locality: Locality,
    stage: dict[fx.Node, int],
    recomputed: Collection[fx.Node],
) -> Remat:
    """Insert the copies into the graph, in place.

    Args:
        stage: of every staged node.
        recomputed: staged forward nodes. A view whose memory is kept is kept with it.
    """
    chosen = {n for n in recomputed if storage_root(n) is n or storage_root(n) in recomputed}
    copies: dict[fx.Node, fx.Node] = {}
    new_stage = dict(stage)
    for node in sorted(chosen, reverse=True):  # readers before arguments
        readers = [
            user
            for user in node.users
            if phase_of(user) is Phase.BACKWARD and new_stage.get(user) == stage[node]
        ]
        if not readers:
            continue
        with graph.graph.inserting_before(min(readers)):
            copy = graph.graph.node_copy(node)
        copy.meta = {**node.meta, "phase": Phase.BACKWARD, "recomputes": node.name}
        for reader in readers:
            reader.replace_input_with(node, copy)
        copies[copy] = node
        new_stage[copy] = stage[node]
    staged = set(locality.staged) | set(copies)
    placed = tuple(node for node in graph.graph.nodes if node in staged)
    return Remat(Locality(locality.constant, locality.free, placed), new_stage, copies)

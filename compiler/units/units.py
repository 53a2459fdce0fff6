"""Nodes -> units: the atoms that the partitioner moves.

The staged forward nodes stand in the order in which the model ran them. Between any two of them
a number of bytes crosses: values made before and read after. A unit ends where that number has
a local minimum, or no more than anywhere before or anywhere behind: after a residual sum, say, so
that attention and MLP are units of their own.
Of several minima without a matrix product between them only the best counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import fx

from ..costs.cost import Cost, node_cost, node_flops
from ..costs.hardware import Device
from ..ir.errors import PartitionError
from ..ir.graph import JointGraph, Phase, is_getitem, is_latest, module_of, nbytes, phase_of
from ..ir.locality import Locality, backward_places

MAX_UNITS = 150


@dataclass(frozen=True)
class Unit:
    """A run of forward nodes that stays together.

    Attributes:
        nodes: in execution order.
        forward, backward: cost per microbatch.
        cut_bytes: bytes that cross if the next unit is on another stage.
    """

    index: int
    nodes: tuple[fx.Node, ...]
    forward: Cost
    backward: Cost
    cut_bytes: int

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(module_of(node) for node in self.nodes))


def units_of(
    graph: JointGraph,
    locality: Locality,
    device: Device,
    pinned: Mapping[fx.Node, int] | None = None,
) -> list[Unit]:
    """Divide the staged forward nodes into at most `MAX_UNITS` units, in execution order.

    Args:
        pinned: nodes whose stage is given: units also end where these begin or end.
    """
    labels = pinned or {}
    nodes = [node for node in locality.staged if phase_of(node) is Phase.FORWARD]
    crossing = crossing_bytes(nodes)
    groups: list[list[fx.Node]] = [[]]
    whole = _unbroken(graph, nodes)
    cuts = set(_good_cuts(nodes, crossing, whole))
    for i, (a, b) in enumerate(pairwise(nodes)):
        if labels.get(a) != labels.get(b):
            if i in whole:
                raise PartitionError(
                    f"buffer {whole[i]!r} is read and updated in one forward, so that all between "
                    f"is on one stage; pin= wants {module_of(a)!r} and {module_of(b)!r} on two"
                )
            cuts.add(i)
    for position, node in enumerate(nodes):
        groups[-1].append(node)
        if position in cuts:
            groups.append([])
    place = {node: i for i, group in enumerate(groups) for node in group}
    forward = [Cost()] * len(groups)
    backward = [Cost()] * len(groups)
    for node, i in backward_places(graph, locality, place).items():
        side = backward if phase_of(node) is Phase.BACKWARD else forward
        side[i] += node_cost(node, device)
    ends = {group[-1]: i for i, group in enumerate(groups) if group}
    cut_bytes = {ends[n]: crossing[p] for p, n in enumerate(nodes) if n in ends}
    return [
        Unit(i, tuple(group), forward[i], backward[i], cut_bytes.get(i, 0))
        for i, group in enumerate(groups)
    ]


def _unbroken(graph: JointGraph, nodes: list[fx.Node]) -> dict[int, str]:
    """The positions after which no unit ends, with the buffer that forbids it: the next microbatch
    reads it where this one updates it."""
    index = {node: i for i, node in enumerate(nodes)}
    found: dict[int, str] = {}
    for read in filter(is_latest, nodes):
        name = read.meta["latest"]
        ends = sorted((index[read], index.get(graph.mutations[name], index[read])))
        found |= dict.fromkeys(range(*ends), name)
    return found


def crossing_bytes(nodes: list[fx.Node]) -> list[int]:
    """For every position, the bytes made at or before it and read after it."""
    index = {node: i for i, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 1)
    for node, made in index.items():
        read = max((index[user] for user in node.users if user in index), default=made)
        if read > made:
            change[made] += nbytes(node)
            change[read] -= nbytes(node)
    crossing, open_bytes = [], 0
    for delta in change[:-1]:
        open_bytes += delta
        crossing.append(open_bytes)
    return crossing


def _good_cuts(nodes: list[fx.Node], crossing: list[int], whole: Collection[int]) -> list[int]:
    """Positions of local minima, those with few bytes first, as many as make `MAX_UNITS`.

    A tier of equal bytes that has no room is thinned evenly, so that units stay alike, unless those
    before it fill half of the room already: what it adds would leave them less alike.
    """
    legal = [i for i in range(len(nodes) - 1) if not is_getitem(nodes[i + 1]) and i not in whole]
    minima: list[int] = []
    start = 0
    while start < len(legal):  # one plateau of equal bytes at a time
        end = start
        while end + 1 < len(legal) and crossing[legal[end + 1]] == crossing[legal[start]]:
            end += 1
        here = crossing[legal[start]]
        rises_left = start == 0 or crossing[legal[start - 1]] > here
        rises_right = end + 1 == len(legal) or crossing[legal[end + 1]] > here
        if rises_left and rises_right:
            minima.append(legal[start])
        start = end + 1
    done = list(accumulate(node_flops(node) for node in nodes))
    plain = [i for i in _lowest_so_far(legal, crossing) if 0 < done[i] < done[-1]]
    best = _best_between_products(done, crossing, plain)
    best |= _best_between_products(done, crossing, minima)
    chosen: list[int] = []
    for level in sorted({crossing[i] for i in best.values()}):
        tier = [i for i in sorted(best.values()) if crossing[i] == level]
        room = MAX_UNITS - 1 - len(chosen)
        if len(tier) > room and len(chosen) >= MAX_UNITS // 2:
            break
        chosen += tier[:: -(-len(tier) // room)]  # every other one, say
    return sorted(chosen)


def _lowest_so_far(legal: list[int], crossing: list[int]) -> list[int]:
    """Positions that no other one before, or none behind, undercuts: in a chain whose values keep
    their size, shrink (convolutions and pooling) or grow, no minimum tells where to cut."""
    found: set[int] = set()
    for positions in (legal, legal[::-1]):
        least = float("inf")
        for i in positions:
            if crossing[i] <= least:
                least = crossing[i]
                found.add(i)
    return sorted(found)


def _best_between_products(done: list[int], crossing: list[int], cuts: list[int]) -> dict[int, int]:
    """Of the cuts that have the same matrix products before them, the one that least crosses.

    The others move next to no work: in the middle of a norm, say. Of equals the last.

    Args:
        done: work up to each position.
    """
    best: dict[int, int] = {}
    for cut in cuts:
        other = best.get(done[cut])
        if other is None or crossing[cut] <= crossing[other]:
            best[done[cut]] = cut
    return best

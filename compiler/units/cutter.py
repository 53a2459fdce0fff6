"""The trade between bytes and seconds of one unit, as minimum cuts.

For one unit, a choice is a set of values to keep; what its backward reads besides is computed
again from these, from the unit's inputs and from parameters. Bytes and seconds are traded at a
rate λ: the set that is best at λ is a minimum cut (each value has two vertices, *wanted* by the
backward and *recomputed*), and all sets on the lower hull of (bytes, seconds) are found by
cutting at the slopes between those known. Random ops are never run twice, nor are
reads of buffers that forward updates.

    source ──∞──▶ wanted(v)                       the backward reads v
    wanted(v) ──λ · bytes(v)──▶ recomputed(v)     v is kept
    recomputed(v) ──seconds(v)──▶ sink            v is recomputed
    recomputed(v) ──∞──▶ wanted(a)                from its arguments
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import networkx as nx
import torch
from torch import fx

from ...passes.programs.fusions import layer_of
from ..costs.cost import node_cost
from ..costs.hardware import Device
from ..ir.graph import (
    Phase,
    is_getitem,
    is_latest,
    is_operator,
    is_random,
    nbytes,
    phase_of,
    root_bytes,
    storage_root,
    tensors,
    viewed,
)
from .stash import Body, Stash, root_of

MAX_OPTIONS = 6
WRITTEN = 3  # times that keeping moves a value: written, the line that is fetched for it, and read
_TICK_S = 1e-12  # capacities are whole numbers: picoseconds


class Cutter:
    """The trade between bytes and seconds of one unit."""

    def __init__(self, body: Body, places: dict[fx.Node, int], device: Device):
        self.body, self.places = body, places
        self.mine = set(body.forward)
        self.seconds = {node: node_cost(node, device).seconds for node in body.forward}
        self.read = {  # forward values that the unit's own backward reads
            a
            for node in body.backward
            for a in node.all_input_nodes
            if a in places and phase_of(a) is Phase.FORWARD
        }

    def keep_all(self) -> Stash:
        return self._stash(frozenset(), frozenset())

    def keep_for_fusions(self) -> Stash:
        """What is best kept where runs of operators are compiled as a whole.

        A kernel that computes elementwise operators again takes hardly longer, and reads less than
        one that reads all of their results; what has to be written in the forward anyway, for a
        library's kernel to read, is only read again. None of it is counted as recomputation.
        """
        found = self._cut(_Fused(self._reads), frozenset())
        return self.keep_all() if found is None else replace(found, recompute_s=0.0)

    def menu(self, forget: bool, first: Stash) -> tuple[Stash, ...]:
        """The choices on the hull, most bytes first; forgetful ones too if asked for."""
        points = self._hull(first, frozenset())
        if forget:
            start = self._cut(self._trade(self._steepest), self.body.abroad)
            points += [start] if start is not None else []
        return self._undominated(points)

    def _undominated(self, points: list[Stash]) -> tuple[Stash, ...]:
        kept: list[Stash] = []
        for stash in sorted(points, key=lambda x: (x.recompute_s, self._bytes(x))):
            if not kept or self._bytes(stash) < self._bytes(kept[-1]):
                kept.append(stash)
        while len(kept) > MAX_OPTIONS:  # drop the one nearest to the line between its neighbours
            inner = range(1, len(kept) - 1)
            kept.pop(min(inner, key=lambda i: self._bulge(*kept[i - 1 : i + 2])))
        return tuple(kept)

    def _bulge(self, a: Stash, b: Stash, c: Stash) -> float:
        saved, whole = self._bytes(a) - self._bytes(b), self._bytes(a) - self._bytes(c)
        return (c.recompute_s - a.recompute_s) * saved / whole - (b.recompute_s - a.recompute_s)

    def _bytes(self, stash: Stash) -> int:
        """What a choice costs this unit: also inputs that only recomputation reads."""
        extra = {n for n in stash.shared if n not in self.mine and not self._reads(n)}
        return stash.stash_bytes + root_bytes(extra) - root_bytes(stash.forgets)

    def _reads(self, root: fx.Node) -> bool:
        return any(storage_root(node) is root for node in self.read)

    @property
    def _steepest(self) -> float:
        """A rate at which one byte is worth more than all the unit's seconds."""
        return sum(self.seconds.values()) + 1e-6

    def _hull(self, first: Stash, forgets: frozenset[fx.Node]) -> list[Stash]:
        last = self._cut(self._trade(self._steepest), forgets)
        if last is None or self._bytes(last) >= self._bytes(first):
            return [first]
        points = [first, last]
        pending = [(first, last)]
        while pending and len(points) < 2 * MAX_OPTIONS:
            a, b = pending.pop(0)
            rate = (b.recompute_s - a.recompute_s) / (self._bytes(a) - self._bytes(b))
            middle = self._cut(self._trade(rate), forgets)
            if middle is None or self._bytes(middle) in (self._bytes(a), self._bytes(b)):
                continue
            if self._bulge(a, middle, b) > 1e-3 * (b.recompute_s - a.recompute_s):
                points.append(middle)
                pending += [(a, middle), (middle, b)]
        return points

    def _trade(self, rate: float) -> _Trade:
        return _Trade(rate, self.seconds, self._reads)

    def _cut(self, prices: _Prices, forgets: frozenset[fx.Node]) -> Stash | None:
        """The best choice at some prices; None where there is none."""
        graph: Any = nx.DiGraph()
        pending: list[fx.Node] = []
        seen: set[fx.Node] = set()

        def want(node: fx.Node) -> tuple[str, fx.Node]:
            if node not in seen:
                seen.add(node)
                pending.append(node)
            return "wanted", node

        for node in self._wanted(forgets):
            graph.add_edge("source", want(node))
        while pending:
            self._add(graph, pending.pop(), prices, forgets, want)
        if "sink" not in graph or "source" not in graph:
            return self._stash(frozenset(seen & self.mine), forgets)
        try:
            _, (near, _) = nx.minimum_cut(
                graph, "source", "sink", flow_func=nx.algorithms.flow.boykov_kolmogorov
            )
        except nx.NetworkXUnbounded:
            return None
        again = frozenset(v[1] for v in near if isinstance(v, tuple) and v[0] == "recomputed")
        return self._stash(again, forgets)

    def _wanted(self, forgets: frozenset[fx.Node]) -> list[fx.Node]:
        wanted = [n for n in self.body.forward if n in self.read or n in forgets]
        return [n for n in wanted if not (n in self.body.abroad and n not in forgets)]

    def _add(
        self,
        graph: Any,
        node: fx.Node,
        prices: _Prices,
        forgets: frozenset[fx.Node],
        want: Callable[[fx.Node], tuple[str, fx.Node]],
    ) -> None:
        """One value's vertices and edges."""
        wanted, again = ("wanted", node), ("recomputed", node)
        if node not in self.mine:  # an input of the unit: kept if it is read at all
            graph.add_edge(wanted, "sink", capacity=prices.arriving(storage_root(node)))
            return
        if node in self.body.abroad and node not in forgets:
            return  # kept for another unit in any case
        whole = len(tensors(node.meta.get("val"))) == 1 and not isinstance(
            node.meta.get("val"), (tuple, list)
        )
        if whole and viewed(node) is None and node not in forgets:
            graph.add_edge(wanted, again, capacity=prices.keeping(node))
        else:
            graph.add_edge(wanted, again)
        price = None if is_random(node) or is_latest(node) else prices.again(node)
        if price is None:
            graph.add_edge(again, "sink")
            return
        graph.add_edge(again, "sink", capacity=price)
        for source in node.all_input_nodes:
            if source in self.places and phase_of(source) is Phase.FORWARD:
                graph.add_edge(again, want(source))

    # -- what a choice means ----------------------------------------------------------------

    def _stash(self, recomputed: frozenset[fx.Node], forgets: frozenset[fx.Node]) -> Stash:
        """Work out what is kept, from what is computed again."""
        read = {n for n in self.read | forgets if n not in recomputed}
        for node in recomputed:
            read |= {
                a
                for a in node.all_input_nodes
                if a in self.places and phase_of(a) is Phase.FORWARD and a not in recomputed
            }
        roots = {r for n in read if (r := root_of(n, self.places)) is not None}
        shared = frozenset(r for r in roots if r not in self.mine or r in self.body.abroad)
        stash = Stash(
            recomputed,
            frozenset(roots - shared),
            shared - forgets,
            forgets,
            math.fsum(self.seconds[node] for node in recomputed),
        )
        most = max(self._forward_peak(stash), self._backward_peak(stash))
        return replace(stash, transient_bytes=max(most - stash.stash_bytes, 0))

    def _forward_peak(self, stash: Stash) -> int:
        leaving = {
            n
            for n in self.body.forward
            if n in self.body.abroad or any(u not in self.mine for u in _forward_users(n))
        }
        return _peak(self.body.forward, leaving | stash.exclusive, set())

    def _backward_peak(self, stash: Stash) -> int:
        own = set(self.body.backward)
        arriving = {
            a
            for n in own
            for a in n.all_input_nodes
            if a not in own and phase_of(a) is Phase.BACKWARD
        }
        leaving = {n for n in own if any(u not in own for u in n.users)}
        order: dict[fx.Node, None] = {}
        for node in self.body.backward:
            self._before(node, stash.recomputed, order)
        return _peak(list(order), leaving, arriving | stash.exclusive)

    def _before(
        self, node: fx.Node, recomputed: frozenset[fx.Node], order: dict[fx.Node, None]
    ) -> None:
        """Append a node, after what it reads and has to be computed again."""
        for source in node.all_input_nodes:
            if source in recomputed and source not in order:
                self._before(source, recomputed, order)
        order[node] = None


class _Prices(Protocol):
    """Whole numbers, in any unit.

    Methods:
        arriving: what keeping the memory of an input costs.
        keeping: what keeping a value costs.
        again: what computing it again costs; None where that is never done.
    """

    def arriving(self, root: fx.Node) -> int: ...

    def keeping(self, node: fx.Node) -> int: ...

    def again(self, node: fx.Node) -> int | None: ...


@dataclass(frozen=True)
class _Trade:
    """Bytes against seconds.

    Args:
        rate: seconds per byte.
        reads: whether the backward reads something in a root's memory.
    """

    rate: float
    seconds: Mapping[fx.Node, float]
    reads: Callable[[fx.Node], bool]

    def arriving(self, root: fx.Node) -> int:
        return 0 if self.reads(root) else self.keeping(root)

    def keeping(self, node: fx.Node) -> int:
        return _capacity(self.rate * nbytes(node))

    def again(self, node: fx.Node) -> int | None:
        return _capacity(self.seconds[node])


@dataclass(frozen=True)
class _Fused:
    """Bytes that kernels of fusions move beside what has to move anyway, and elements that are
    computed again."""

    reads: Callable[[fx.Node], bool]

    def arriving(self, root: fx.Node) -> int:
        return 0 if self.reads(root) else nbytes(root)

    def keeping(self, node: fx.Node) -> int:
        return (1 if _is_written(node) else WRITTEN) * nbytes(node)

    def again(self, node: fx.Node) -> int | None:
        if viewed(node) is not None:
            return 0
        if not _is_elementwise(node):
            return None
        return sum(tensor.numel() for tensor in tensors(node.meta.get("val")))


def _is_written(node: fx.Node) -> bool:
    """Whether a value is in memory after the forward though nothing keeps it: a library's kernel
    makes or reads it, or the kernels of another layer read it."""
    if not _is_elementwise(node) and viewed(node) is None:
        return True
    for user in _forward_users(node):
        if viewed(user) is node:
            if _is_written(user):
                return True
        elif not _is_elementwise(user) or layer_of(user) != layer_of(node):
            return True
    return False


def _is_elementwise(node: fx.Node) -> bool:
    if is_getitem(node) or not is_operator(node):
        return False
    target: Any = node.target
    return torch.Tag.pointwise in target.tags or target is torch.ops.aten._to_copy.default


def _forward_users(node: fx.Node) -> list[fx.Node]:
    return [u for u in node.users if u.op != "output" and phase_of(u) is Phase.FORWARD]


def _peak(order: Sequence[fx.Node], leaving: set[fx.Node], arriving: set[fx.Node]) -> int:
    """The most bytes alive while nodes run in order; ``arriving`` are there at the start."""
    inside = set(order) | arriving
    stays = {storage_root(node) for node in leaving}
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(order):
        for value in (node, *node.all_input_nodes):
            if value in inside:
                last[storage_root(value)] = i
    roots = {storage_root(node) for node in arriving}
    live = most = sum(nbytes(root) for root in roots)
    ends: dict[int, list[fx.Node]] = {}
    for root, i in last.items():
        if root not in stays:
            ends.setdefault(i, []).append(root)
    for i, node in enumerate(order):
        if storage_root(node) is node and node not in roots:
            live += nbytes(node) if not _is_part(node) else 0
        most = max(most, live)
        live -= sum(_own_bytes(root, inside) for root in ends.get(i, ()))
    return most


def _is_part(node: fx.Node) -> bool:
    """An item of an op's tuple: its bytes were counted with the op."""
    return is_getitem(node)


def _own_bytes(root: fx.Node, inside: set[fx.Node]) -> int:
    if root not in inside:
        return 0
    if isinstance(root.meta.get("val"), (tuple, list)):
        read = sum(nbytes(user) for user in root.users if is_getitem(user))
        return nbytes(root) - read  # what nobody picks is freed with the tuple
    return nbytes(root)


def _capacity(seconds: float) -> int:
    return round(seconds / _TICK_S)

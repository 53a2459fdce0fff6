"""Units with their options -> the partitioning problem as plain data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import fx

from ...passes.generators.shape import Homes
from ...passes.graph.boundary import crossing_nbytes
from ...passes.schedule.load import Load
from ...passes.schedule.registry import ScheduleKind
from ..costs.hardware import Device
from ..ir.graph import JointGraph, Phase, nbytes, phase_of, storage_root
from ..ir.locality import gradient_sums
from ..ir.problem import Kept, Link, Option, Problem, Users, Value
from ..units.stash import Body, Stash


@dataclass(frozen=True)
class Terms:
    """What the problem has besides the graph.

    Attributes:
        param_bytes: parameter FQN -> what holding it takes: weight, gradient, optimizer states.
        homes: per stage, its rank.
        load: what the schedule asks of ranks.
        budgets: per rank, bytes; infinity for no limit.
        reserve_bytes: per rank, taken by what the problem does not describe.
        pins: unit -> stage.
        tied_per_step: the parts of tied gradients are not sent with every microbatch.
        boundary: dtype in which fp32 values are sent; None for as they are.
    """

    homes: Homes
    microbatches: int
    param_bytes: Mapping[str, int]
    load: Load
    budgets: tuple[float, ...] = ()
    reserve_bytes: tuple[float, ...] = ()
    pins: Mapping[int, int] | None = None
    tied_per_step: bool = False
    boundary: torch.dtype | None = None


Readers = tuple[int, ...]


@dataclass(frozen=True)
class Grounds:
    """What the problems of a graph have in common, whatever it is divided into.

    Attributes:
        menus: per unit, its ways to run.
    """

    graph: JointGraph
    bodies: Sequence[Body]
    places: Mapping[fx.Node, int]
    menus: Sequence[Sequence[Stash]]
    _traffic: dict[object, Mapping[tuple[int, Readers], int]] = field(default_factory=dict)

    @cached_property
    def users(self) -> Mapping[str, frozenset[int]]:
        """Parameter FQN -> the units that read it."""
        found: dict[str, set[int]] = defaultdict(set)
        owner = self.graph.owners
        for node, unit in self.places.items():
            for source in node.all_input_nodes:
                name = owner.get(storage_root(source))
                if name is not None:
                    found[name].add(unit)
        return {name: frozenset(units) for name, units in found.items()}

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """The order of the units."""
        found = {
            (unit, self.places[user])
            for node, unit in self.places.items()
            if phase_of(node) is Phase.FORWARD
            for user in node.users
            if user in self.places and phase_of(user) is Phase.FORWARD
        }
        return tuple(sorted((a, b) for a, b in found if a != b))

    @cached_property
    def kept(self) -> Sequence[Kept]:
        return _kept(self.bodies, self.places, self.menus)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return tuple(", ".join(body.unit.modules) or "(model)" for body in self.bodies)

    def traffic(
        self, tied_per_step: bool, boundary: torch.dtype | None
    ) -> Mapping[tuple[int, Readers], int]:
        """(a unit, others that read what it makes) -> bytes, alike values summed up."""
        if (tied_per_step, boundary) not in self._traffic:
            severed = gradient_sums(self.graph) if tied_per_step else set()
            found: dict[tuple[int, Readers], int] = defaultdict(int)
            for node, unit in self.places.items():
                users = [u for u in node.users if u in self.places and u not in severed]
                readers = {self.places[u] for u in users} - {unit}
                if readers:
                    found[unit, tuple(sorted(readers))] += crossing_nbytes(node, boundary)
            self._traffic[tied_per_step, boundary] = found
        return self._traffic[tied_per_step, boundary]


Seconds = Sequence[Sequence[float]]
"""Per unit, of its ways to run: forward, backward and recomputation of a microbatch."""


def formulate(
    grounds: Grounds,
    seconds: Seconds,
    device: Device,
    terms: Terms,
    by_kind: Mapping[str, Seconds] = MappingProxyType({}),
) -> Problem:
    """The problem of one graph.

    Args:
        device: of the ranks; with those of each where they are of several kinds.
        by_kind: the seconds on each of these; empty where there is one.
    """
    alone, weights = _weights(grounds, terms.param_bytes)
    options = tuple(
        tuple(
            Option(
                s,
                stash.stash_bytes,
                alone[i],
                stash.transient_bytes,
                stash.label,
                tuple(there[i][k] for there in by_kind.values()),
            )
            for k, (stash, s) in enumerate(zip(menu, costs, strict=True))
        )
        for i, (menu, costs) in enumerate(zip(grounds.menus, seconds, strict=True))
    )
    kinds = list(by_kind)
    traffic = grounds.traffic(terms.tied_per_step, terms.boundary)
    return Problem(
        options,
        grounds.edges,
        len(terms.homes),
        tuple(
            Value(unit, readers, receive_s=size / device.link_bytes_per_s)
            for (unit, readers), size in traffic.items()
        ),
        (*weights, *grounds.kept),
        pins=terms.pins or {},
        homes=terms.homes,
        in_flight=terms.load.in_flight,
        together_in_flight=terms.load.together,
        budget_bytes=terms.budgets,
        reserve_bytes=terms.reserve_bytes,
        kinds=tuple(kinds.index(name) for name in device.order) if kinds else (),
        links=links_of(device, max(terms.homes) + 1),
        max_weight=terms.microbatches - terms.load.idle,
        sum_weight=terms.load.idle,
        min_units=1,
        labels=grounds.labels,
    )


def links_of(device: Device, ranks: int) -> tuple[tuple[Link, ...], ...]:
    """Between the ranks of a replica, as slower ones than the device's own; empty where all of them
    are that."""
    if ranks == 1 or (device.placed is None and not device.ranks):
        return ()
    own = device.link_bytes_per_s, device.link_latency_s
    links = {(a, b): device.link(a, b) for a in range(ranks) for b in range(ranks) if a != b}
    if set(links.values()) == {own}:
        return ()
    made = {ends: Link(own[0] / rate, latency_s) for ends, (rate, latency_s) in links.items()}
    return tuple(tuple(made.get((a, b), Link()) for b in range(ranks)) for a in range(ranks))


def elsewhere(
    problem: Problem, kind: ScheduleKind, ranks: int, microbatches: int, virtual: int
) -> Problem:
    """The same units on another number of ranks, or in another schedule; all ranks alike."""
    shape = kind.shape(ranks, microbatches, virtual)
    load = kind.load(shape)
    return replace(
        problem,
        n_stages=shape.n_stages,
        homes=shape.homes,
        in_flight=load.in_flight,
        together_in_flight=load.together,
        budget_bytes=problem.budget_bytes[:1] * ranks,
        reserve_bytes=(max(problem.reserve_bytes),) * ranks,
        kinds=(),
        links=(),
        max_weight=microbatches - load.idle,
        sum_weight=load.idle,
    )


def microbatches_of(problem: Problem) -> int:
    """Of a replica, as `formulate` and `elsewhere` were told."""
    return round(problem.max_weight + problem.sum_weight)


def _weights(grounds: Grounds, param_bytes: Mapping[str, int]) -> tuple[list[int], list[Kept]]:
    """Static bytes of what one unit alone holds, and the weights that several units read."""
    alone = [0] * (1 + max(grounds.places.values(), default=0))
    shared: dict[frozenset[int], int] = defaultdict(int)
    for name, units in grounds.users.items():
        if len(units) == 1:
            alone[next(iter(units))] += param_bytes[name]
        else:
            shared[units] += param_bytes[name]
    return alone, [
        Kept(size, tuple((u, None) for u in sorted(units)), per_microbatch=False)
        for units, size in shared.items()
    ]


def _kept(
    bodies: Sequence[Body], places: Mapping[fx.Node, int], menus: Sequence[Sequence[Stash]]
) -> list[Kept]:
    """The stashed values that several units read, and those that only some options read."""
    users: dict[fx.Node, dict[int, frozenset[int]]] = defaultdict(dict)
    unless: dict[fx.Node, dict[int, frozenset[int]]] = defaultdict(dict)
    for body, menu in zip(bodies, menus, strict=True):
        index = body.unit.index
        for found, name in ((users, "shared"), (unless, "forgets")):
            for root in {root for stash in menu for root in getattr(stash, name)}:
                which = frozenset(k for k, s in enumerate(menu) if root in getattr(s, name))
                found[root][index] = which
    for body in bodies:  # what a lower unit's backward reads is kept in any case
        for root in body.abroad:
            readers = {places[u] for u in root.users if u in places}
            if readers and min(readers) < body.unit.index:
                users[root][body.unit.index] = frozenset(range(len(menus[body.unit.index])))

    def listed(chosen: dict[int, frozenset[int]]) -> Users:
        return tuple(
            (unit, None if len(which) == len(menus[unit]) else which)
            for unit, which in sorted(chosen.items())
        )

    total: dict[tuple[Users, Users], int] = defaultdict(int)
    for root, chosen in users.items():
        total[listed(chosen), listed(unless[root])] += nbytes(root)
    return [Kept(size, reads, unless=without) for (reads, without), size in total.items()]

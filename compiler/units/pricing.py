"""Seconds of units: by peak rates, or measured, each option timed as a stage of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...passes.graph.placement import place
from ...passes.graph.remat import rematerialise
from ...passes.programs.lower import lower
from ..costs.cost import total_cost
from ..costs.hardware import Device
from ..ir.graph import JointGraph
from ..ir.locality import Locality
from ..profiling.profile import Profiler, UnitTimes
from .stash import Body, Stash

LEAST = 0.25  # of its estimate: what recomputation costs at least, however noisy the clock


@dataclass(frozen=True)
class UnitPrices:
    """Seconds of one unit per microbatch.

    Attributes:
        recompute_s: of each option.
        launches: of forward and backward; none where seconds are measured, which has them.
    """

    forward_s: float
    backward_s: float
    recompute_s: tuple[float, ...]
    launches: tuple[int, int] = (0, 0)

    def of(self, option: int) -> tuple[float, float, float]:
        return self.forward_s, self.backward_s, float(self.recompute_s[option])


def roofline(bodies: Sequence[Body], menus: Sequence[Sequence[Stash]]) -> list[UnitPrices]:
    """The prices of a device's peak rates."""
    return [
        UnitPrices(
            body.unit.forward.seconds,
            body.unit.backward.seconds,
            tuple(stash.recompute_s for stash in menu),
            (body.unit.forward.launches, body.unit.backward.launches),
        )
        for body, menu in zip(bodies, menus, strict=True)
    ]


def repriced(
    bodies: Sequence[Body], menus: Sequence[Sequence[Stash]], device: Device
) -> list[UnitPrices]:
    """The prices of another device than that which units and menus were made for, at its rates."""
    found = []
    for body, menu in zip(bodies, menus, strict=True):
        forward, backward = total_cost(body.forward, device), total_cost(body.backward, device)
        again = tuple(total_cost(stash.recomputed, device).seconds for stash in menu)
        launches = forward.launches, backward.launches
        found.append(UnitPrices(forward.seconds, backward.seconds, again, launches))
    return found


def measured(
    graph: JointGraph,
    locality: Locality,
    bodies: Sequence[Body],
    menus: Sequence[Sequence[Stash]],
    profiler: Profiler,
    batch: Sequence[torch.Tensor],
) -> list[float]:
    """Seconds of all units with each of their options, for `measured_prices`.

    Where a backend compiles units, each is compiled as it is when it keeps everything; what
    recomputing adds is timed with eager kernels, and scaled by what the backend makes of the
    forward.

    Args:
        batch: the leaves of one microbatch.
    """
    eager = profiler.eager
    ways = range(max(len(menu) for menu in menus))
    rows = [_times(graph, locality, bodies, menus, k, eager, batch) for k in ways]
    compiled = profiler is not eager
    rows.append(_times(graph, locality, bodies, menus, 0, profiler, batch) if compiled else rows[0])
    return [x for row in rows for t in row for x in (t.forward_s, t.backward_s)]


def measured_prices(
    bodies: Sequence[Body], menus: Sequence[Sequence[Stash]], flat: Sequence[float]
) -> list[UnitPrices]:
    """Prices of all units and options.

    What a forgetful option makes later units compute again is not in any one unit: it is priced
    by the roofline, in proportion to what the unit's forward really takes.

    Args:
        flat: as `measured` has them.
    """
    every, n = max(len(menu) for menu in menus), len(bodies)
    *times, runs = [
        [UnitTimes(*flat[2 * (k * n + i) : 2 * (k * n + i) + 2]) for i in range(n)]
        for k in range(every + 1)
    ]
    prices = []
    for i, (body, menu) in enumerate(zip(bodies, menus, strict=True)):
        plain, ran = times[0][i], runs[i]
        start = menu[0].recompute_s  # remat="full" has no option that keeps everything
        scale = ran.forward_s / body.unit.forward.seconds if body.unit.forward.seconds else 1.0
        faster = ran.forward_s / plain.forward_s if plain.forward_s else 1.0
        again = []
        for k, stash in enumerate(menu):
            estimate = (stash.recompute_s - start) * scale
            found = (times[k][i].backward_s - plain.backward_s) * faster
            again.append(estimate if stash.forgets else max(found, LEAST * estimate))
        prices.append(UnitPrices(ran.forward_s, ran.backward_s, tuple(again)))
    return prices


def _times(
    graph: JointGraph,
    locality: Locality,
    bodies: Sequence[Body],
    menus: Sequence[Sequence[Stash]],
    k: int,
    profiler: Profiler,
    batch: Sequence[torch.Tensor],
) -> list[UnitTimes]:
    """With option k of every unit, or its last."""
    own, twin = graph.copy()
    home = {twin[node]: body.unit.index for body in bodies for node in body.forward}
    here = locality.moved(twin)
    placement = place(own, here, home)
    chosen = [menu[min(k, len(menu) - 1)] for menu in menus]
    again = {twin[node] for stash in chosen for node in stash.recomputed}
    remat = rematerialise(own, here, placement.stage, again)
    program = lower(own, remat.locality, remat.stage, len(bodies))
    return profiler.times(program.stages, batch)

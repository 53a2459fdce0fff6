"""Bytes that no plan of a way is below, from sums over the units.

A rank holds what its units read of the parameters, with gradients and states, for the whole step;
the batch and all buffers, and what its device takes for itself. In the moment after the forward
with which it has most microbatches in flight, f_r, each of these keeps what the units' ways to run
keep at least. So of a division that puts unit u on rank r(u), the ranks need

    room_r  ≥  Σ over its units of  a_u + f_r · b_u

With any weights w_r, these inequalities add up to one in which r(u) may as well be chosen for each
unit alone, whatever the division: Σ w_r · room_r ≥ Σ over all units of the least w_r · (a_u + f_r ·
b_u). Weights that are all alike, and 1 / (Σ a_u + f_r · Σ b_u), with which it does not matter where
units stand that are in proportion to all, are tried. What several units share counts once, where it
takes least. When ranks step, they hold no microbatch, but what the optimizer needs for a moment: of
all parameters together no more than of each rank's, added up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...passes.schedule.load import Load
from ..driver.work import Outline, Settings
from ..ir.errors import MemoryBudgetError
from ..ir.problem import Kept
from ..planning.advice import gib
from ..units.stash import Stash

ROUNDING = 1e-9  # of a budget

Ways = tuple[tuple[float, float], ...]
"""Of a unit: bytes of a microbatch that it keeps, of its own and of what others read as well."""


@dataclass(frozen=True)
class Least:
    """What the units of a graph take at least.

    Attributes:
        units: what a unit holds all the time, and its ways to run -> how many are so.
        shared: held all the time of what several units read.
        moment: what the optimizer needs for one, of all parameters.
    """

    units: Mapping[tuple[float, Ways], int]
    shared: float
    moment: int = 0

    @staticmethod
    def of(outline: Outline) -> Least:
        parts, held_bytes = outline.parts, outline.held_bytes
        alone, shared = [0.0] * len(parts.menus), 0.0
        for name, users in parts.grounds.users.items():
            if len(users) == 1:
                alone[next(iter(users))] += held_bytes[name]
            else:
                shared += held_bytes[name]
        if not outline.graph.trains:
            return Least(Counter((each, ((0.0, 0.0),)) for each in alone), shared)
        ways = _ways(parts.menus, parts.grounds.kept)
        moment = outline.settings.footprint.whole_optimizer_bytes
        return Least(Counter(zip(alone, ways, strict=True)), shared, moment)

    @cached_property
    def sums(self) -> tuple[float, float]:
        """Of all units: held all the time, and kept by a microbatch."""
        each = [(n * a, n * min(map(sum, ways))) for (a, ways), n in self.units.items()]
        return math.fsum(a for a, _ in each) + self.shared, math.fsum(b for _, b in each)

    def weighed(self, ranks: Sequence[tuple[float, int]]) -> float:
        """The least weight of all.

        Args:
            ranks: of each its weight, and microbatches in flight at once.
        """
        places = set(ranks)
        lightest = min(w for w, _ in places)
        others = min(w * f for w, f in places)
        total = lightest * self.shared
        for (alone, ways), count in self.units.items():
            total += count * min(
                w * (alone + f * own) + others * more for w, f in places for own, more in ways
            )
        return total


def _ways(menus: Sequence[Sequence[Stash]], kept: Sequence[Kept]) -> list[Ways]:
    """Per unit. What several keep is put down to the one that can do without it by computing it
    again, or to one that always keeps it; what only some ways to run ask for, to none."""
    own = [[[float(stash.stash_bytes), 0.0] for stash in menu] for menu in menus]
    for each in kept:
        always = [unit for unit, which in each.users if which is None]
        if not (each.per_microbatch and always and len(each.unless) <= 1):
            continue
        unit, without = each.unless[0] if each.unless else (always[0], frozenset[int]())
        for option, way in enumerate(own[unit]):
            way[1] += each.bytes if without is not None and option not in without else 0.0
    return [tuple(sorted({(way[0], way[1]) for way in ways})) for ways in own]


def in_flight(load: Load | None, ranks: int) -> list[int]:
    """Per rank, how many microbatches all of its stages have in flight at once, at least.

    Args:
        load: None where the order is searched, or ranks hold several stages. One is then in flight
            on all of a rank's stages when the last of them has run its forward, as no backward is
            over before those of later stages.
    """
    return [1] * ranks if load is None else list(load.in_flight)


def taken(settings: Settings) -> list[int]:
    """Per rank of a replica, what its device takes for itself at least."""
    options = settings.options
    if not settings.whole:
        return [0] * options.n_stages
    found = []
    for rank in range(options.n_stages):
        device = settings.rates.at(rank)
        links = 1 if options.n_stages > 1 else 0  # some stage may send no gradients
        parts = device.reserved.parts(links, options.dp, settings.beside(rank))
        found.append(sum(size for _, size in parts))
    return found


def rooms(settings: Settings) -> list[float]:
    """Per rank, what is left of its budget beside the batch, buffers and its device's own."""
    batch = settings.batch_bytes * settings.microbatches + settings.footprint.buffer_bytes
    return [b - batch - own for b, own in zip(settings.budgets, taken(settings), strict=True)]


def check_room(outline: Outline, least: Least, load: Load | None) -> None:
    """Raises MemoryBudgetError where no division fits, whatever is recomputed."""
    settings = outline.settings
    room, flying = rooms(settings), in_flight(load, settings.options.n_stages)
    if any(map(math.isinf, room)):
        return
    if len(set(room)) > 1:  # in another order ranks have others' room
        flying = [min(flying)] * len(flying)
    static, stash = least.sums
    even = [1.0] * len(room)
    over = [(static + least.moment - math.fsum(room)) / len(room)]
    for weights in (even, [1 / max(1.0, static + f * stash) for f in flying]):
        weighed = least.weighed(list(zip(weights, flying, strict=True)))
        offered = math.fsum(w * each for w, each in zip(weights, room, strict=True))
        over.append((weighed - offered) / math.fsum(weights))
    limit = math.fsum(settings.budgets) / len(room)
    if max(over) > ROUNDING * limit:
        what = ", gradients and optimizer states" if outline.graph.trains else ""
        if max(over) > over[0] and stash:
            what += ", and what microbatches keep at least"
        raise MemoryBudgetError(
            f"a rank needs {gib(limit + max(over))} of {gib(limit)} for weights{what} alone, "
            f"{gib(max(over))} too much",
            (),
            None,
            proven=True,
        )

"""The exact optimum over all divisions of an order that has few ideals, with options and memory.

An ideal holds with each unit all that must come before it, so a stage holds what one ideal has and
a smaller one has not: a division is a chain of ideals, as that of a line is a chain of places where
it is cut. What `baselines` does with runs of a line is done here with such differences.
Layers with residuals, an encoder and its decoder, or towers side by side have a few hundred ideals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...compiler.ir.problem import Problem
from ..integer.work import Work
from .ideals import ideals_of
from .lazy import CAPS, LazySearch, largest_stage_s
from .segments import EARLIER, LATER, Division, Floats, Table, Transfers, lower_bounds

MOST_CELLS = 3e7  # of the tables of all stages together
MOST_SUMS = 5e8  # numbers that are added up for one table

_LEVELS = 16  # of momentary bytes that bounds tell apart
_SUM_S = 1.5e-9  # work: of such a number
_Table = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Answer:
    """What is known of the optimum.

    Attributes:
        stage, option: per unit; None if nothing that fits and is below the bound was found.
        bound: no solution has a smaller objective; infinite: none fits.
    """

    stage: tuple[int, ...] | None
    option: tuple[int, ...] | None
    bound: float


def applies(problem: Problem) -> bool:
    """Whether each stage has its own rank, and groups are one unit."""
    return not problem.shares_ranks and not problem.together


def minimise(problem: Problem, upper: float, *, work: Work) -> Answer | None:
    """The best division; None if there are too many ideals, or no work is left for any answer.

    Args:
        upper: an objective that is known to be reached, or infinite.
    """
    shared = len(problem.values) + len(problem.kept) + problem.n_units
    most = min(math.sqrt(MOST_CELLS / problem.n_stages), math.sqrt(MOST_SUMS / max(1, shared)))
    found = ideals_of(problem, most, work)
    if found is None:
        return None
    work.spend(_SUM_S * shared * len(found) ** 2)
    lattice = Lattice(problem, found)
    best: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    lows = [lower_bounds(lattice, s) for s in range(problem.n_stages)]
    for cap in CAPS:  # a quick solution first: it limits what the next search looks at
        search = _Search(lattice, work, upper, cap, lows)
        best, upper = search.run() or best, search.upper
        if search.closed or search.bound == math.inf or work.over:
            break
    stage, option = best or (None, None)
    return Answer(stage, option, search.bound)


class Lattice:
    """A problem along its ideals, as `segments.Line` along an order: [i, j] is what ideal j has and
    ideal i has not; the first ideal is empty, the last one has all units.

    Attributes:
        positions: the units, one by one, in an order that the edges allow.
        inside: [ideal, unit].
        nested: [i, j]: j has all of i.
    """

    def __init__(self, problem: Problem, ideals: Sequence[int]) -> None:
        self.problem = problem
        self.positions: Sequence[Sequence[int]] = [(unit,) for unit in range(problem.n_units)]
        self.tables: dict[tuple[int, int], Table] = {}
        width = (problem.n_units + 7) // 8
        data = b"".join(ideal.to_bytes(width, "little") for ideal in ideals)
        table = np.frombuffer(data, dtype=np.uint8).reshape(len(ideals), width)
        bits = np.unpackbits(table, axis=1, bitorder="little")[:, : problem.n_units]
        self.inside = bits.astype(np.float64)  # products of it are fast
        sizes = self.inside.sum(axis=1)
        self.nested: _Table = self.inside @ self.inside.T >= sizes[:, None] - 0.5
        self.linked = [
            number
            for number, kept in enumerate(problem.kept)
            if kept.unless or any(which is not None for _, which in kept.users)
        ]
        self.transfer_s = self._transfers().on_stages(problem)
        self.once_bytes = self._shared(per_microbatch=False)
        self.microbatch_bytes = self._shared(per_microbatch=True)

    def units(self, i: int, j: int) -> list[int]:
        """In order."""
        return [int(u) for u in np.flatnonzero(self.inside[j] - self.inside[i] > 0.5)]

    def sums(self, per_unit: Sequence[float] | Floats) -> Floats:
        total = self.inside @ np.asarray(per_unit, dtype=np.float64)
        return np.where(self.nested, total[None, :] - total[:, None], 0.0)

    def largest(self, per_unit: Floats) -> Floats:
        """Rounded down to a few levels."""
        levels = np.unique(per_unit)
        if len(levels) > _LEVELS:
            levels = np.unique(np.quantile(levels, np.linspace(0, 1, _LEVELS), method="lower"))
        table = np.zeros((len(self.inside),) * 2)
        for level in levels[levels > 0]:
            table[self._any(np.flatnonzero(per_unit >= level))] = level
        return table

    def allowed(self, stage: int) -> _Table:
        foreign = [unit for unit, pinned in self.problem.pins.items() if pinned != stage]
        sizes = self.sums([1.0] * self.problem.n_units)
        return self.nested & (sizes >= self.problem.min_units - 0.5) & ~self._any(foreign)

    def fixed_bytes(self, stage: int) -> Floats:
        shared = self.once_bytes + self.problem.in_flight[stage] * self.microbatch_bytes
        return shared + self.problem.reserve_bytes[stage]

    def _count(self, units: Sequence[int] | npt.NDArray[np.int_]) -> Floats:
        """[i, j]: how many of some units."""
        each: Floats = self.inside[:, units].sum(axis=1)
        return each[None, :] - each[:, None]

    def _any(self, units: Sequence[int] | npt.NDArray[np.int_]) -> _Table:
        some: _Table = self._count(units) > 0.5
        return some

    def _transfers(self) -> Transfers:
        sent = np.zeros(self.nested.shape)
        received, counts = ([np.zeros_like(sent) for _ in range(4)] for _ in range(2))
        for value in self.problem.values:
            readers = sorted(set(value.readers) - {value.source})
            source, read = self._any([value.source]), self._count(readers)
            sent += value.send_s * (source & (read < len(readers) - 0.5))
            earlier = (self.inside[:, value.source] > 0.5)[:, None] & (read > 0.5)
            later = (self.inside[:, value.source] < 0.5)[None, :] & (read > 0.5)
            for where, here in ((EARLIER, earlier), (LATER, later)):
                received[where] += value.receive_s * here
                counts[where] += (value.send_s + value.receive_s > 0) & here
        return Transfers(sent, tuple(received), tuple(counts))

    def _shared(self, *, per_microbatch: bool) -> Floats:
        total, decided = np.zeros(self.nested.shape), set(self.linked)
        for number, kept in enumerate(self.problem.kept):
            if kept.per_microbatch == per_microbatch and number not in decided:
                total += kept.bytes * self._any(sorted({unit for unit, _ in kept.users}))
        return total


class _Search(LazySearch):
    """Along ideals: segments are looked at one by one.

    Attributes:
        tighter: per stage, those of its kind that have no more room for anything, itself too.
    """

    line: Lattice

    def __init__(self, line: Lattice, work: Work, upper: float, cap: int, lows: list[Floats]):
        super().__init__(line, work, upper, cap, lows)
        problem = line.problem
        pairs = zip(problem.budget_bytes, problem.reserve_bytes, strict=True)
        rooms = list(zip(problem.in_flight, (a - b for a, b in pairs), strict=True))
        self.tighter = [
            [
                t
                for t, (more, less) in enumerate(rooms)
                if more >= n and less <= room and problem.kind_of(t) == problem.kind_of(s)
            ]
            for s, (n, room) in enumerate(rooms)
        ]

    def _learn(self, found: Division) -> bool:
        limit_s = largest_stage_s(self.line.problem, self.upper)
        news = False
        for s, i, j in found.segments():
            if not self.limited[s] or (s, i, j) in self.known:
                continue
            sack = self._sack(s)
            self.known.add((s, i, j))
            transfer_s = float(self.line.transfer_s[s][i, j])
            units, fixed = self.line.units(i, j), float(sack.fixed[i, j])
            seconds, error = sack.between(units, fixed, limit_s - transfer_s, self.work)
            self.costs[s][i, j] = seconds + transfer_s
            for t in self.tighter[s]:
                low = seconds + float(self.line.transfer_s[t][i, j]) - error
                self.lows[t][i, j] = max(self.lows[t][i, j], low)
            news = True
        return news

    def _options(self, s: int, i: int, j: int, limit_s: float) -> dict[int, int] | None:
        sack = self._sack(s)
        return sack.chosen(self.line.units(i, j), float(sack.fixed[i, j]), limit_s)

    def _units(self, i: int, j: int) -> Sequence[int]:
        return self.line.units(i, j)

"""The best division of segments whose seconds are found out only where a division wants them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from ...compiler.ir.problem import Problem
from ..integer.solvers import GAP
from ..integer.work import Work
from .knapsack import Knapsack
from .segments import (
    Division,
    Floats,
    Line,
    Segments,
    best_division,
    ends_within,
    most_even,
    option_table,
)

CAPS = (24, 1024, 16384)  # choices kept per segment, see Knapsack.cap

_CELL_S, _PASSES = 3e-9, 4  # work: of a number in a table, each read so often to find a division


class LazySearch(ABC):
    """The best division, where the time of a segment is found when a division wants it.

    Bounds stand in for segments that are not known; the best division on them is exact once all
    of its segments are known, and a lower bound until then.

    Attributes:
        lows, costs: per stage, [i, j]: no options are faster; these fit (infinite: not known).
        bound: no division into runs has a smaller objective.
        finished: not for want of work.
        upper: an objective that is known to be reached.

    Args:
        lows: of `segments.lower_bounds`, or what another search has made of them.
    """

    def __init__(
        self, line: Segments, work: Work, upper: float, cap: int, lows: list[Floats]
    ) -> None:
        problem = line.problem
        self.line, self.work, self.upper, self.lows = line, work, upper, lows
        self._cap, self._sacks = cap, dict[int, Knapsack]()
        self.limited = [math.isfinite(budget) for budget in problem.budget_bytes]
        self.costs = [
            np.full_like(low, math.inf) if limited else low
            for low, limited in zip(self.lows, self.limited, strict=True)
        ]
        self.known: set[tuple[int, ...]] = set()
        self.best: Division | None = None
        self.bound, self.finished = -math.inf, False

    def run(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Stages and options; None if nothing fits that beats ``upper``."""
        problem = self.line.problem
        while not self.finished:
            found = best_division(self.lows, problem.max_weight, problem.sum_weight)
            self.bound = min(float(found.objective) if found else math.inf, self.upper)
            self.finished = self.closed or not (found and self._learn(found))
            if found:
                self._offer(found)
            self.work.spend(_PASSES * _CELL_S * sum(low.size for low in self.lows))
            if self.work.over:
                break
        return self._assignment(self.best) if self.best else None

    def evened(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Stages and options of the most even division of those whose stages take no longer than
        any may in one that is as good as ``upper``; None if none is found."""
        limit_s = largest_stage_s(self.line.problem, self.upper)
        while not self.work.over:
            found = most_even(self.lows, limit_s)
            self.work.spend(_CELL_S * sum(low.size for low in self.lows))
            if found is None or not self._learn(found):
                return self._assignment(found) if found else None
        return None

    @property
    def closed(self) -> bool:
        """Whether nothing is better than ``upper``."""
        return math.isfinite(self.upper) and self.upper - self.bound <= GAP * abs(self.upper)

    @abstractmethod
    def _learn(self, found: Division) -> bool:
        """Find the times of a division's segments; whether there were any to find."""

    @abstractmethod
    def _options(self, s: int, i: int, j: int, limit_s: float) -> dict[int, int] | None:
        """The fastest options of a segment; None if none fit below a limit."""

    def _light(self, s: int, i: int, j: int) -> bool:
        """Whether a segment's fastest options are known to fit."""
        return not self.limited[s]

    def _sack(self, s: int) -> Knapsack:
        if s not in self._sacks:
            self._sacks[s] = Knapsack(self.line, s, self._cap)
        return self._sacks[s]

    @abstractmethod
    def _units(self, i: int, j: int) -> Sequence[int]:
        """Of a segment."""

    def _offer(self, found: Division) -> None:
        each = [float(self.costs[s][i, j]) for s, i, j in found.segments()]
        value = self.line.problem.objective(each)
        if value < self.upper:
            self.best, self.upper = Division(value, found.cuts), float(value)

    def _assignment(self, best: Division) -> tuple[tuple[int, ...], tuple[int, ...]]:
        problem = self.line.problem
        option, stage = [0] * problem.n_units, [0] * problem.n_units
        for s, i, j in best.segments():
            fastest = option_table(self.line, s).fastest
            for unit in self._units(i, j):
                stage[unit], option[unit] = s, fastest[unit]
            if self._light(s, i, j):
                continue
            seconds = float(self.costs[s][i, j] - self.line.transfer_s[s][i, j])
            limits = (seconds * (1 + 1e-9), seconds * 1.01, math.inf)
            tries = (self._options(s, i, j, limit_s) for limit_s in limits)
            for unit, k in (next((some for some in tries if some is not None), None) or {}).items():
                option[unit] = k
        return tuple(stage), tuple(option)


def largest_stage_s(problem: Problem, objective: float) -> float:
    """No stage takes longer in a solution with at most this objective."""
    if not math.isfinite(objective):
        return math.inf
    fastest = math.fsum(problem.fewest_s())
    limit = math.inf
    if problem.max_weight:
        limit = (objective - problem.sum_weight * fastest) / problem.max_weight
    if problem.sum_weight:
        limit = min(limit, objective / problem.sum_weight)
    return limit * (1 + 1e-9) + 1e-9 * abs(objective)


class LineSearch(LazySearch):
    """Along a line: the times of all segments from a start are found together."""

    line: Line

    def __init__(self, line: Line, work: Work, upper: float, cap: int, lows: list[Floats]) -> None:
        super().__init__(line, work, upper, cap, lows)
        for s, limited in enumerate(self.limited):
            if limited:
                self.costs[s] = np.where(line.light(s), lows[s], math.inf)

    def _light(self, s: int, i: int, j: int) -> bool:
        return not self.limited[s] or bool(self.line.light(s)[i, j])

    def _learn(self, found: Division) -> bool:
        limit_s = largest_stage_s(self.line.problem, self.upper)
        ends = ends_within(self.lows, limit_s)
        news = False
        for s, i, j in found.segments():
            if (s, i) in self.known or math.isfinite(self.costs[s][i, j]):
                continue
            sack, transfer_s = self._sack(s), self.line.transfer_s[s][i]
            self.known.add((s, i))
            room_s = limit_s - float(transfer_s[max(i, ends[s]) :].min())
            seconds, error = sack.seconds(i, ends[s], room_s, self.work)
            allowed = np.isfinite(self.lows[s][i])
            self.costs[s][i] = np.where(allowed, seconds + transfer_s, math.inf)
            self.lows[s][i] = np.maximum(self.lows[s][i], self.costs[s][i] - error)
            news = True
        return news

    def _options(self, s: int, i: int, j: int, limit_s: float) -> dict[int, int] | None:
        return self._sack(s).options(i, j, limit_s)

    def _units(self, i: int, j: int) -> Sequence[int]:
        return [unit for units in self.line.positions[i:j] for unit in units]

"""Which rank has which kind of device, where there are several: the order whose simulated step is
shortest."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ...passes.integer.work import Work
from ...passes.partition.baselines import quick_objective, solve_dynamic
from ...passes.partition.sharing import apart
from ..ir.errors import MemoryBudgetError, PartitionError
from ..ir.problem import Problem, Solution
from ..units.pricing import UnitPrices
from .formulation import microbatches_of
from .planner import Planner
from .refine import StepModel, refine

MOST = 256  # orders that are looked at, those first in which neighbours differ least often
DIVIDED, REFINED = 24, 4  # of these: that are divided and simulated; that are refined after it
DIVIDED_S, REFINED_S = 1.0, 0.5  # of the solver and of the local search, counted, for each


@dataclass(frozen=True)
class Ordered:
    """An order of kinds of devices along the ranks of a replica.

    Attributes:
        step_s: simulated; infinite where nothing fits by the prices.
    """

    order: tuple[str, ...]
    planner: Planner
    step_s: float


@dataclass(frozen=True)
class Orders:
    """What was looked at.

    Attributes:
        best: the best first; those that were not divided are not in it.
        tried: how many orders there were to choose from, at most `MOST`.
    """

    best: Sequence[Ordered]
    tried: int

    @property
    def note(self) -> str:
        """Which was taken, and why."""
        first, others = self.best[0], self.best[1:]
        said = f"ranks on {runs_of(first.order)}"
        if self.tried == 1:
            return said
        of = f"of {self.tried} orders"
        if len(self.best) < self.tried:
            of = f"the best of {len(self.best)} that were divided of {self.tried} orders"
        worse = [each for each in others if math.isfinite(each.step_s)]
        if not worse:
            return f"{said}: {of}"
        last = worse[-1]
        more = last.step_s / first.step_s - 1
        return f"{said}: {of}; a step on {runs_of(last.order)} would take {more:.1%} longer"


def ordered(
    orders: Iterable[tuple[str, ...]],
    planner_of: Callable[[tuple[str, ...]], Planner],
    prices: Sequence[UnitPrices],
) -> Orders:
    """The orders that may be best, by the prices: bounds leave some out, divisions are simulated.

    Memory is that of the prices, which the programs of a plan may exceed; so those that do not fit
    come last, and are not left out.
    """
    found = [(order, planner_of(order)) for order in itertools.islice(orders, MOST)]
    if len(found) == 1:
        return Orders([Ordered(*found[0], 0.0)], 1)
    tried = [_Tried(*each, each[1].problem(prices), prices) for each in found]
    tried.sort(key=lambda each: each.estimate_s)
    best_s, done = math.inf, list[_Tried]()
    for each in tried:
        if each.least_s <= best_s and len(done) < DIVIDED:
            done.append(each)
            best_s = min(best_s, each.step_s)
    done.sort(key=lambda each: each.step_s)
    steps = [each.refined_s if i < REFINED else each.step_s for i, each in enumerate(done)]
    made = [Ordered(x.order, x.planner, step_s) for x, step_s in zip(done, steps, strict=True)]
    return Orders(sorted(made, key=lambda each: each.step_s), len(found))


@dataclass(frozen=True)
class _Tried:
    """One order, looked at as closely as it is asked for."""

    order: tuple[str, ...]
    planner: Planner
    problem: Problem
    prices: Sequence[UnitPrices]

    @cached_property
    def least_s(self) -> float:
        """No division of the units' order has a shorter step, even if links took no time."""
        slowest = replace(
            self._free, max_weight=float(microbatches_of(self.problem)), sum_weight=0.0
        )
        return quick_objective(apart(slowest))

    @cached_property
    def estimate_s(self) -> float:
        """Between what a step takes where all transfers hide, and where none does."""
        both = (quick_objective(apart(each)) for each in (self.problem, self._free))
        return sum(both) / 2

    @property
    def _free(self) -> Problem:
        return replace(self.problem, values=(), links=())

    @cached_property
    def model(self) -> StepModel:
        return self.planner.step_model(self.problem, self.prices)

    @cached_property
    def solution(self) -> Solution | None:
        """The best division by the prices; None where none fits."""
        with contextlib.suppress(MemoryBudgetError, PartitionError):
            found = solve_dynamic(apart(self.problem), work=Work(DIVIDED_S))
            return Planner.as_if_hidden(self.problem, self.model, found)
        return None

    @cached_property
    def step_s(self) -> float:
        """Simulated."""
        found = self.solution
        return math.inf if found is None else self.model.step_s(found.stage, found.option)

    @cached_property
    def refined_s(self) -> float:
        """After a local search."""
        found = self.solution
        if found is None or not self.planner.graph.trains or self.problem.n_stages == 1:
            return self.step_s
        found = refine(self.model, found, REFINED_S)[0]
        return self.model.step_s(found.stage, found.option)


def runs_of(order: Sequence[str]) -> str:
    """ "4 × a100, 4 × l4"."""
    runs = ((name, len(list(same))) for name, same in itertools.groupby(order))
    return ", ".join(f"{count} × {name}" for name, count in runs)

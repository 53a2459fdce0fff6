"""Units -> stages and options: the fastest division that fits into memory, and how sure that is.

    presolve    the same problem with fewer units and options       presolve.py, dominance.py
    dynamic     the best contiguous division: a first solution      baselines.py
    ideals      all divisions, where there is nothing but time      ideals.py
    lattice     all divisions, where few are possible               lattice.py
    ILP         everything, from the best solution so far           ilp.py

Whatever a solver returns is evaluated again, by the problem itself, before it counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ...compiler.ir.errors import MemoryBudgetError, OptionError, PartitionError
from ...compiler.ir.problem import Problem, Solution, fits, solution_of
from ..integer import ilp
from ..integer.excess import excess_bytes, infeasible
from ..integer.runs import Answer
from ..integer.solvers import GAP, PROVEN_GAP, SolverError
from ..integer.windows import Window, seconds_within, windows
from ..integer.work import Work
from . import dominance, ideals, lattice
from .baselines import numbered, solve_dynamic
from .lazy import largest_stage_s
from .presolve import Reduced, reduce
from .sharing import shared_divisions

LATE = "stopped by the clock after {:.0f} s: a machine with less to do may find another plan"
SOLVERS = ("auto", "highs", "cbc", "dynamic")

DYNAMIC_S = 10.0  # of the work, for the first solution
_NEAREST_S = 5.0  # to find how near a division comes where it is known that none fits
_ILP = {"auto": ("highs", "cbc"), "highs": ("highs", "cbc"), "cbc": ("cbc",), "dynamic": ()}


def solve(problem: Problem, *, time_limit_s: float = 30.0, solver: str = "auto") -> Solution:
    """The assignment with the smallest objective that fits into memory, or the best one found.

    Args:
        time_limit_s: how much to search: seconds of an idle core, counted as work, so that the
            answer does not depend on what else the machine does (`passes.integer.work`).
        solver: auto; highs: the ILP with HiGHS, or with CBC where that is missing; cbc; dynamic:
            contiguous divisions only. A solver that is missing or crashes is named in the note.

    Raises:
        MemoryBudgetError: nothing fits into memory, or nothing was found that does.
        PartitionError: pins, groups, order and fewest units of a stage contradict each other.
        OptionError: no such solver.
    """
    if solver not in SOLVERS:
        raise OptionError(f"solver={solver!r}: use one of {', '.join(SOLVERS)}")
    reduced = dominance.contract(reduce(numbered(problem)))
    search = _Search(problem, reduced, solver, time.perf_counter(), Work(time_limit_s))
    search.contiguous()
    if solver == "auto":
        search.all_ideals()
        search.few_ideals()
    if search.best is None:
        search.least_excess()
    if not search.proven:
        search.integer_program()
    return search.result()


@dataclass
class _Search:
    """The state of a search.

    Attributes:
        problem, reduced: as given, and the smaller one that is searched.
        started: when, on the clock of `time.perf_counter`.
        best: of the reduced problem; fits into memory.
        nearest: where nothing fits, the division with the smallest excess.
        bound: no solution has a smaller objective.
        hopeless: no solution fits into memory.
        by: what found ``best``.
        missing: solvers that are not to be asked again.
    """

    problem: Problem
    reduced: Reduced
    solver: str
    started: float
    work: Work
    best: Solution | None = None
    nearest: Solution | None = None
    bound: float = -math.inf
    hopeless: bool = False
    by: str = ""
    stopped: bool = False
    missing: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bound = _simple_bound(self.small)

    @property
    def small(self) -> Problem:
        return self.reduced.problem

    @property
    def proven(self) -> bool:
        return self.hopeless or (
            self.best is not None
            and self.best.objective - self.bound <= PROVEN_GAP * abs(self.best.objective)
        )

    def offer(self, stage: Sequence[int], option: Sequence[int], by: str) -> bool:
        """Take an assignment if it is legal, fits and is the best so far; whether it is sound."""
        try:
            found = solution_of(self.small, stage, option, by)
        except PartitionError as error:
            self.notes.append(f"{by} returned an illegal solution ({error})")
            return False
        if not fits(self.small, found):
            if self.nearest is None or _excess(self.small, found) < _excess(
                self.small, self.nearest
            ):
                self.nearest = found
            return False
        if self.best is None or found.objective < self.best.objective:
            self.best, self.by = found, by
        return True

    def contiguous(self) -> None:
        """The best divisions of the units' order; the optimum if that is the only order."""
        small = self.small
        try:
            if small.shares_ranks:
                for found in shared_divisions(small, self.work.part(DYNAMIC_S)):
                    self.offer(found.stage, found.option, "dynamic")
                return
            found = solve_dynamic(small, work=self.work.part(DYNAMIC_S))
        except MemoryBudgetError as error:
            self.nearest = error.nearest
            self.hopeless = error.proven
            return
        except PartitionError:  # pins or groups that no run of units keeps to
            return
        self.offer(found.stage, found.option, "dynamic")
        if found.proven:
            self.bound = max(self.bound, found.objective)

    def all_ideals(self) -> None:
        """All divisions, where the order has few ideals and units have one option."""
        if self.proven or not ideals.applies(self.small):
            return
        upper = self.best.objective if self.best else math.inf
        half = self.work.part(self.work.limit_s / 2)
        answer = ideals.minimise_time(self.small, upper, work=half)
        if answer is None:
            return
        if answer.bound == math.inf:
            self.hopeless = self.best is None
            return
        sound = answer.stage is None or self.offer(
            answer.stage, (0,) * self.small.n_units, "ideals"
        )
        if sound and self.best is not None:
            self.bound = max(self.bound, min(answer.bound, self.best.objective))

    def few_ideals(self) -> None:
        """All divisions with all options, where the order has very few ideals."""
        if self.proven or not lattice.applies(self.small):
            return
        upper = self.best.objective if self.best else math.inf
        half = self.work.part(self.work.limit_s / 2)
        answer = lattice.minimise(self.small, upper, work=half)
        if answer is None:
            return
        if answer.bound == math.inf:
            self.hopeless = self.best is None
            return
        sound = answer.stage is None or answer.option is None
        if answer.stage is not None and answer.option is not None:
            sound = self.offer(answer.stage, answer.option, "lattice")
        if sound:
            reached = self.best.objective if self.best else math.inf
            self.bound = max(self.bound, min(answer.bound, reached))

    def least_excess(self) -> None:
        """Nothing fits so far: a first solution, or the proof that there is none."""
        if not any(math.isfinite(budget) for budget in self.small.budget_bytes):
            return
        limits = windows(replace(self.small, budget_bytes=()), math.inf)
        if limits is None:
            raise PartitionError(_no_division(self.problem))
        limit_s = self.work.left_s / 2
        limit_s = min(limit_s, _NEAREST_S) if self.hopeless else limit_s
        for name in self._solvers():
            near = self.nearest
            start = (near.stage, near.option) if near and _inside(near.stage, limits) else None
            try:
                answer = ilp.minimise_excess(
                    self.small, limits, start, solver=name, work=self.work.part(limit_s)
                )
            except SolverError as error:
                self._drop(name, error)
                continue
            if answer.bound == math.inf:
                raise PartitionError(_no_division(self.problem))
            if answer.stage is not None and answer.option is not None:
                self.offer(answer.stage, answer.option, name)
            if answer.doubt:
                self.notes.append(answer.doubt)
            if self.best is None and answer.bound > GAP * ilp.largest_bytes(self.small):
                self.hopeless = True
            return

    def integer_program(self) -> None:
        """The integer program, within the stages that the best objective leaves to every unit."""
        upper = self.best.objective if self.best else math.inf
        limits = windows(self.small, largest_stage_s(self.small, upper))
        if limits is None:
            self.hopeless = self.best is None
            return
        best = self.best
        start = (best.stage, best.option) if best and _inside(best.stage, limits) else None
        for name in self._solvers():
            if self.work.over:
                self.stopped = True
                return
            try:
                answer = ilp.minimise_time(
                    self.small, limits, start, upper, solver=name, work=self.work
                )
            except SolverError as error:
                self._drop(name, error)
                continue
            self._take(answer, name)
            return

    def _take(self, answer: Answer, name: str) -> None:
        self.stopped = not answer.finished
        sound = True
        if answer.stage is not None and answer.option is not None:
            sound = self.offer(answer.stage, answer.option, name)
            if not sound:
                self.notes.append(f"{name}'s solution does not hold when it is checked")
        if answer.doubt:
            self.notes.append(answer.doubt)
        reached = self.best.objective if self.best else math.inf
        if answer.bound == math.inf and self.best is None:
            self.hopeless = True
        elif not self.proven and answer.bound > reached * (1 + 1e-5):
            self.notes.append(f"{name} finds nothing as good as what is known")
        elif sound or not answer.finished:
            self.bound = max(self.bound, min(answer.bound, reached))

    def _solvers(self) -> list[str]:
        return [name for name in _ILP[self.solver] if name not in self.missing]

    def _drop(self, name: str, error: Exception) -> None:
        self.missing.add(name)
        self.notes.append(str(error))

    def result(self) -> Solution:
        seconds = time.perf_counter() - self.started
        if self.best is None:
            raise self._infeasible()
        stage, option = self.reduced.lift(self.best.stage, self.best.option)
        found = solution_of(self.problem, stage, option, self.by, seconds=seconds)
        bound = min(self.bound, found.objective)
        gap = found.objective - bound
        notes = list(self.notes)
        if not self.proven and self.stopped:
            notes.append(f"time limit of {self.work.limit_s:g} s reached")
        if self.work.late:
            notes.append(LATE.format(seconds))
        if not self.proven and not self._solvers():
            notes.append("best contiguous division")
        if not self.proven:
            notes.append(f"gap {100 * gap / found.objective:.2g} %")
        return replace(found, bound=bound, proven=self.proven, note=", ".join(notes))

    def _infeasible(self) -> MemoryBudgetError:
        if self.nearest is None:
            raise PartitionError(_no_division(self.problem))
        stage, option = self.reduced.lift(self.nearest.stage, self.nearest.option)
        nearest = solution_of(self.problem, stage, option, self.nearest.solver)
        return infeasible(self.problem, nearest, proven=self.hopeless)


def _simple_bound(problem: Problem) -> float:
    """No solution is faster than this, whatever memory there is."""
    fastest = problem.fewest_s()
    total = math.fsum(fastest)
    longest = [max(fastest)]
    for kind in sorted(set(problem.kinds)):  # each way to count what ranks hold is a bound
        seconds, most = seconds_within(problem, kind)
        room = math.fsum(most[each] for each in problem.kinds)
        longest.append(math.fsum(seconds) / room if room else 0.0)
    return problem.max_weight * max(longest) + problem.sum_weight * total


def _inside(stage: Sequence[int], limits: Sequence[Window]) -> bool:
    return all(first <= s <= last for s, (first, last) in zip(stage, limits, strict=True))


def _excess(problem: Problem, solution: Solution) -> float:
    return max(excess_bytes(problem, solution))


def _no_division(problem: Problem) -> str:
    return (
        f"no division into {problem.n_stages} stages has at least {problem.min_units} units on "
        "every stage and keeps to the order, pins and groups: use fewer stages"
    )

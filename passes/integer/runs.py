"""An integer program and a solver -> an answer of which only what holds is said.

Three numbers of a solver have to agree: its bound, the objective that it tells, and what the
solution that it returns is worth by the problem's own arithmetic. HiGHS (1.16) breaks that where it
is given a start: its presolve keeps some optimum, but not the start, and what is left of the start
may be a better solution of the smaller program; where nothing beats that one, the start itself
comes back as the optimum. So an answer whose numbers disagree is asked for again without a start;
one that still disagrees proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pulp  # type: ignore[import-untyped]

from ...compiler.ir.errors import PartitionError
from ...compiler.ir.problem import Problem, Solution, fits
from .solvers import GAP, PROVEN_GAP, SolverError, solver_of
from .work import Work

SCALE = 1000.0  # of objective and budget: solvers' tolerances are absolute
ROUNDING = 1e-4  # of SCALE: by this much numbers may differ that say the same

Assignment = tuple[Sequence[int], Sequence[int]]
"""Stages and options of all units."""


@dataclass(frozen=True)
class Program:
    """An integer program, and what its variables mean.

    Attributes:
        unit: seconds or bytes that one unit of the program's objective stands for.
        offset: part of the objective that no variable changes.
        placed: an assignment, from the variables' values.
        started: the variables' values, from an assignment.
        evaluated: an assignment, evaluated by the problem; illegal ones raise PartitionError.
        worth: the objective of that, in seconds or bytes.
        within: the problem whose budgets a solution has to keep to; None if it need not.
    """

    program: Any
    unit: float
    offset: float
    placed: Callable[[Callable[[Any], float]], tuple[tuple[int, ...], tuple[int, ...]]]
    started: Callable[[Sequence[int], Sequence[int]], dict[Any, int]]
    evaluated: Callable[[Sequence[int], Sequence[int]], Solution]
    worth: Callable[[Solution], float]
    within: Problem | None


@dataclass(frozen=True)
class Answer:
    """What an integer solver says.

    Attributes:
        stage, option: per unit; None where it found nothing.
        bound: no solution has a smaller objective (infinite: there is no solution).
        finished: it was not stopped for want of work, or by the clock.
        doubt: why nothing of it proves anything, if so.
    """

    stage: tuple[int, ...] | None
    option: tuple[int, ...] | None
    bound: float
    finished: bool
    doubt: str = ""


@dataclass(frozen=True)
class _Told:
    """An answer, and the solver's own objective in seconds or bytes; NaN where it has none."""

    answer: Answer
    objective: float = math.nan


def run(program: Program, start: Assignment | None, name: str, work: Work) -> Answer:
    """Solve a program, and again without the start where the solver contradicts itself.

    Args:
        start: legal, and within the budgets where these count.
        name: highs or cbc.

    Raises:
        SolverError: it is not installed, or crashed.
    """
    told = _attempt(program, start, name, work)
    why = _contradiction(program, told, start)
    if why and start is not None:
        told = _attempt(program, None, name, work)
        why = _contradiction(program, told, start)
    if why:
        return replace(told.answer, bound=-math.inf, doubt=f"{name} contradicts itself: {why}")
    return told.answer


def _contradiction(program: Program, told: _Told, start: Assignment | None) -> str:
    """What of an answer cannot be true; nothing if all can."""
    answer, one = told.answer, program.unit * SCALE * ROUNDING
    if answer.stage is None or answer.option is None:
        known = answer.bound == math.inf and start is not None
        return "no solution, although one is known" if known else ""
    try:
        found = program.evaluated(answer.stage, answer.option)
    except PartitionError as error:
        return f"its solution is illegal ({error})"
    if program.within is not None and not fits(program.within, found, ROUNDING):
        return "its solution does not fit into memory"
    worth = program.worth(found)
    if answer.finished and worth - told.objective > one:
        return f"its solution is worth {worth:g}, not {told.objective:g}"
    if answer.bound - worth > one:
        return f"its solution is worth {worth:g}, below its bound of {answer.bound:g}"
    least = PROVEN_GAP * max(worth, program.unit * SCALE)
    if answer.finished and start is not None and worth - answer.bound > least:
        return f"its optimum is worth {worth:g}, above its bound of {answer.bound:g}"
    return ""


def _attempt(program: Program, start: Assignment | None, name: str, work: Work) -> _Told:
    """One run of a solver."""
    lp = program.program
    solver = solver_of(name, work, start is not None, sum(map(len, lp.constraints())))
    if not solver.available():
        raise SolverError(f"{name} is not installed")
    for variable in lp.variables():
        variable.varValue = None
    for variable, value in program.started(*start).items() if start is not None else ():
        variable.setInitialValue(value)
    try:
        lp.solve(solver)
        found = lp.sol_status
    except Exception as error:  # whatever a solver's binding raises
        raise SolverError(f"{name} failed: {error}") from error
    if found in (pulp.LpSolutionInfeasible, pulp.LpSolutionUnbounded):
        return _Told(Answer(None, None, math.inf, True))
    optimal = found == pulp.LpSolutionOptimal
    objective = getattr(solver, "objective", None)
    if objective is None:
        objective = pulp.value(lp.objective)
    bound = getattr(solver, "bound", -math.inf)
    if optimal and name == "cbc":  # which tells no bound
        bound = objective - GAP * abs(objective)
    bound = (bound + program.offset) * program.unit
    if found not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return _Told(Answer(None, None, bound, False))
    placed = program.placed(_value)
    return _Told(Answer(*placed, bound, optimal), (objective + program.offset) * program.unit)


def _value(variable: Any) -> float:
    return float(variable.varValue or 0.0)

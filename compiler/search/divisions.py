"""Divisions by prices alone, in as much memory as programs may need less than their prices say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...passes.integer.excess import infeasible
from ...passes.partition.sharing import roomy_division
from ...passes.partition.solve import solve
from ..ir.errors import MemoryBudgetError
from ..ir.problem import Problem, Solution, solution_of

QUICK_S = 1.0  # of the solver, counted
SLACK = 1.03  # of the budget: programs may need less than their prices say
ROUNDS = 4  # to find out what gradients of weights wait with
CLOSE = 0.02  # of the budget: what is found of that is not worth another round
DOUBTFUL = 1.5  # of the budget: where the nearest division is priced below this, its plan decides

Carried = Callable[[Solution], Sequence[float]]
"""Of a division: bytes per rank that prices know nothing of."""


def roughly_divided(problem: Problem, budgets: Sequence[float]) -> Solution:
    """The best division where stages of one rank have all of its memory each, or the nearest one.

    Args:
        budgets: per rank.

    Raises:
        MemoryBudgetError: none comes near even so.
    """
    refused = False
    try:
        found = roomy_division(problem)
    except MemoryBudgetError as error:
        found = error.nearest
        refused = _doubtful(found, [budgets[home] for home in problem.homes])
        found = solution_of(problem, found.stage, found.option, found.solver)
    if refused:
        raise infeasible(problem, found, proven=False)
    return found


def divided(problem: Problem, budgets: Sequence[float], carried: Carried | None) -> Solution:
    """The best division, or the nearest one where none fits but programs might.

    What gradients of weights that are split off wait with depends on the division, and prices know
    nothing of it. So it is held in reserve, and the next division looked for beside it.

    Args:
        budgets: per rank.
        carried: what they wait with; None where none are split off.

    Returns:
        Its bytes are with what is carried.

    Raises:
        MemoryBudgetError: none comes near.
    """
    own = problem.reserve_bytes
    for left in reversed(range(1 if carried is None else ROUNDS)):
        refused, before = False, problem.reserve_bytes
        try:
            found = solve(problem, time_limit_s=QUICK_S, solver="dynamic")
        except MemoryBudgetError as error:
            found, refused = error.nearest, True
        if carried is not None:
            reserves = tuple(map(sum, zip(own, carried(found), strict=True)))
            problem = replace(problem, reserve_bytes=reserves)
            found = solution_of(problem, found.stage, found.option, found.solver)
        changes = zip(before, problem.reserve_bytes, problem.budget_bytes, strict=True)
        settled = all(abs(a - b) <= CLOSE * budget for a, b, budget in changes)
        if (refused or settled or not left) and _doubtful(found, budgets):
            raise infeasible(problem, found, proven=False)
        if settled:
            break
    return found


def _doubtful(found: Solution, budgets: Sequence[float]) -> bool:
    """Whether a rank is priced so far above its budget that no programs could fit."""
    pairs = zip(found.ranks_bytes, budgets, strict=True)
    return any(held > DOUBTFUL * budget for held, budget in pairs)

"""By how much a division misses its memory budgets, and the error that says so."""

from __future__ import annotations

from ...compiler.ir.errors import MemoryBudgetError
from ...compiler.ir.problem import Problem, Solution

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))


def excess_bytes(problem: Problem, solution: Solution) -> tuple[float, ...]:
    """Per rank, what is needed above the budget; 0 where it fits."""
    pairs = zip(solution.ranks_bytes, problem.budget_bytes, strict=True)
    return tuple(max(0.0, used - limit) for used, limit in pairs)


def infeasible(problem: Problem, nearest: Solution, *, proven: bool) -> MemoryBudgetError:
    """The error for a problem of which ``nearest`` is the division that fits best."""
    over = excess_bytes(problem, nearest)
    worst = max(range(problem.n_ranks), key=over.__getitem__)
    amounts = nearest.ranks_bytes[worst], problem.budget_bytes[worst], over[worst]
    needs, limit, more = map(_text, amounts)
    found = "" if proven else " in the best division found"
    who = "rank" if problem.shares_ranks else "stage"
    return MemoryBudgetError(
        f"{who} {worst} needs {needs} of {limit}{found}, {more} too much", over, nearest, proven
    )


def _text(amount: float) -> str:
    """In a unit of its own, in which it has digits that tell."""
    unit, size = next((pair for pair in _UNITS if amount >= 0.01 * pair[1]), _UNITS[-1])
    return f"{amount / size:.2f} {unit}" if size > 1 else f"{amount:g} bytes"

"""What presolve leaves out, no optimum needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from pipecompile.compiler.ir.problem import Problem, Solution, fits, solution_of
from pipecompile.passes.partition import dominance, presolve
from pipecompile.passes.partition.presolve import Reduced, reduce
from support.problems import every_solution, light_problems, optimum, problems, reduced_or_none

STEPS: dict[str, Callable[[Problem], Reduced]] = {
    "memory": lambda problem: presolve._without_memory(presolve.unreduced(problem)),
    "options": lambda problem: presolve._fewer_options(presolve.unreduced(problem)),
    "groups": lambda problem: presolve.merge(
        presolve.unreduced(problem), presolve._groups(problem)
    ),
    "all of these": reduce,
    "neighbours": lambda problem: dominance.contract(reduce(problem)),
}


def costs(budgets: Sequence[float], solutions: Iterable[Solution]) -> npt.NDArray[np.float64]:
    """[solution, (slowest, all seconds, bytes of every stage that has a budget)]."""
    limited = [s for s, budget in enumerate(budgets) if math.isfinite(budget)]
    rows = {
        (max(each.stages_s), sum(each.stages_s), *(each.stages_bytes[s] for s in limited))
        for each in solutions
    }
    return np.array(sorted(rows)).reshape(-1, 2 + len(limited))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@settings(max_examples=100, deadline=None)
@given(problem=problems() | light_problems() | light_problems())
def test_a_step_of_presolve_keeps_the_optimum(
    step: Callable[[Problem], Reduced], problem: Problem
) -> None:
    """And more: for every solution, one that is no worse in seconds and bytes."""
    if reduced_or_none(problem) is None:
        return
    every, smaller = every_solution(problem), step(problem)
    rest = every_solution(smaller.problem)
    assert optimum(smaller.problem, rest) == pytest.approx(optimum(problem, every))
    lifted = []
    for each in rest:
        stage, option = smaller.lift(each.stage, each.option)
        lifted.append(solution_of(problem, stage, option, "lifted"))
        assert lifted[-1].objective == pytest.approx(each.objective)
        assert fits(problem, lifted[-1]) == fits(smaller.problem, each)
    budgets = smaller.problem.budget_bytes
    left = costs(budgets, lifted)
    assert all(np.any(np.all(left <= row + 1e-9, axis=1)) for row in costs(budgets, every))

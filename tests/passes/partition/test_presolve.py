"""What presolve leaves out, no optimum needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from pipecompile.compiler.ir.problem import (
    Kept,
    Option,
    Problem,
    Solution,
    Value,
    fits,
    solution_of,
)
from pipecompile.passes.partition import dominance, presolve
from pipecompile.passes.partition.presolve import Reduced, reduce
from pipecompile.passes.partition.solve import solve
from support.problems import (
    check_against_all,
    every_solution,
    light_problems,
    optimum,
    problems,
    reduced_or_none,
)

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
        (max(each.stages_s), sum(each.stages_s), *(each.ranks_bytes[s] for s in limited))
        for each in solutions
    }
    return np.array(sorted(rows)).reshape(-1, 2 + len(limited))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@settings(max_examples=15, deadline=None)
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


def apart(unit: Option, **more: Any) -> Problem:
    """Two units that would like to be on one stage, and are too large for it."""
    default: dict[str, Any] = {"budget_bytes": (10.0, 10.0)}
    return Problem(((unit,),) * 2, (), 2, (Value(0, (1,), 5.0, 5.0),), **(default | more))


@pytest.mark.parametrize(
    "problem",
    [
        apart(Option(1.0, static_bytes=6.0)),
        apart(Option(1.0, stash_bytes=3.0), in_flight=(2, 2)),
        apart(Option(1.0, static_bytes=3.0, transient_bytes=6.0)),
        apart(Option(1.0, static_bytes=3.0), reserve_bytes=(5.0, 5.0)),
        apart(Option(1.0), kept=tuple(Kept(6.0, ((unit, None),), False) for unit in (0, 1))),
        apart(Option(1.0), kept=tuple(Kept(3.0, ((u, None),)) for u in (0, 1)), in_flight=(2, 2)),
        apart(Option(1.0, static_bytes=6.0), budget_bytes=(10.0, math.inf), pins={0: 0}),
    ],
    ids=["static", "stash", "transient", "reserve", "shared", "shared stash", "one budget"],
)
def test_a_limit_that_binds_stays(problem: Problem) -> None:
    assert solve(replace(problem, budget_bytes=())).objective == 2.0
    check_against_all(problem)
    assert solve(problem).objective == 6.0


@pytest.mark.parametrize(
    "fast",
    [
        Option(1.0, static_bytes=8.0),
        Option(1.0, stash_bytes=4.0),
        Option(1.0, transient_bytes=8.0),
    ],
)
def test_a_limit_that_the_last_option_breaks_stays(fast: Option) -> None:
    problem = Problem(((Option(2.0), fast),), (), 1, in_flight=(2,), budget_bytes=(7.0,))
    check_against_all(problem)
    assert solve(problem).option == (0,)


def test_an_option_that_spares_shared_bytes_stays() -> None:
    kept = Kept(5.0, ((1, None),), unless=((0, frozenset({1})),))
    options = ((Option(1.0), Option(1.0)), (Option(1.0),))
    problem = Problem(options, (), 1, kept=(kept,), budget_bytes=(4.0,))
    check_against_all(problem)
    assert solve(problem).option == (1, 0)


def test_an_option_that_takes_no_shared_bytes_stays() -> None:
    kept = Kept(5.0, ((0, frozenset({0})),))
    problem = Problem(((Option(1.0), Option(2.0)),), (), 1, kept=(kept,), budget_bytes=(4.0,))
    check_against_all(problem)
    assert solve(problem).option == (1,)


def test_what_only_a_dropped_option_shares_takes_no_bytes() -> None:
    kept = Kept(5.0, ((0, frozenset({1})),))
    problem = Problem(((Option(1.0), Option(2.0)),), (), 1, kept=(kept,), budget_bytes=(4.0,))
    check_against_all(problem)
    assert solve(problem).option == (0,)


@pytest.mark.parametrize(
    "kept",
    [
        Kept(5.0, ((0, frozenset({1})),)),
        Kept(5.0, ((1, None),), unless=((0, frozenset({2})),)),
    ],
    ids=["users", "unless"],
)
def test_shared_bytes_are_those_of_the_same_option_after_others_are_dropped(kept: Kept) -> None:
    """Unit 0's first option is dropped; the others get new numbers."""
    options = ((Option(2.0), Option(1.0), Option(1.5)), (Option(1.0),))
    problem = Problem(options, (), 1, kept=(kept,), budget_bytes=(4.0,))
    check_against_all(problem)
    found = solve(problem)
    assert found.option == (2, 0)
    assert fits(problem, found)


def test_units_of_a_group_count_one_by_one() -> None:
    problem = Problem(((Option(1.0),),) * 4, (), 2, together=((0, 3), (1, 2)), min_units=2)
    check_against_all(problem)
    assert solve(problem).objective == 2.0


def test_a_group_with_several_options_stays_together() -> None:
    each = (Option(1.0, static_bytes=4.0), Option(2.0))
    problem = Problem((each,) * 3, (), 2, together=((0, 2),), budget_bytes=(5.0, 5.0))
    check_against_all(problem)
    assert solve(problem).objective == 3.0

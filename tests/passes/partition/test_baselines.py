"""The dynamic program is exact on runs of units; simple strategies are never better."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from pipecompile.compiler.ir.errors import MemoryBudgetError, PartitionError
from pipecompile.compiler.ir.problem import Option, Problem, Solution, fits, validate
from pipecompile.passes.partition import baselines
from pipecompile.passes.partition.baselines import solve_dynamic
from pipecompile.passes.partition.sharing import roomy_division
from pipecompile.passes.partition.solve import solve
from support.problems import (
    check_dynamic,
    every_solution,
    light_problems,
    optimum,
    problems,
    reduced_or_none,
    shared_problems,
)

SIMPLE = [
    baselines.solve_uniform,
    baselines.solve_parameters,
    baselines.solve_sequential,
    baselines.solve_all_or_nothing,
]


def in_runs(problem: Problem, every: list[Solution]) -> list[Solution]:
    groups = baselines.in_order(problem)
    return [
        each
        for each in every
        if all(each.stage[a] <= each.stage[b] for (a, *_), (b, *_) in itertools.pairwise(groups))
    ]


@settings(max_examples=60, deadline=None)
@given(problems() | problems(chain=True))
def test_the_dynamic_program_finds_the_best_division_into_runs(problem: Problem) -> None:
    if (reduced := reduced_or_none(problem)) is None:
        return
    problem = reduced.problem
    every = every_solution(problem)
    runs = in_runs(problem, every)
    try:
        found = solve_dynamic(problem)
    except PartitionError:
        assert optimum(problem, runs) == math.inf
        return
    assert fits(problem, found)
    assert found.objective == pytest.approx(optimum(problem, runs))
    if found.proven:
        assert found.objective == pytest.approx(optimum(problem, every))


@settings(max_examples=40, deadline=None)
@given(problems(chain=True))
def test_the_dynamic_program_is_exact_on_chains(problem: Problem) -> None:
    check_dynamic(problem)


@settings(max_examples=40, deadline=None)
@given(problems(chain=True))
def test_simple_strategies_are_legal_and_never_better(problem: Problem) -> None:
    problem = replace(problem, pins={}, min_units=0)
    free = solve(replace(problem, budget_bytes=()))
    for strategy in SIMPLE:
        found = strategy(problem)
        validate(problem, found.stage, found.option)
        assert found.objective >= free.objective * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(shared_problems())
def test_ranks_that_hold_several_stages_lack_memory_and_not_divisions(problem: Problem) -> None:
    """Where there are divisions into runs, one is found or named as the nearest."""
    runs = in_runs(problem, every_solution(problem))
    try:
        found = solve(problem, solver="dynamic")
    except MemoryBudgetError as error:
        found = error.nearest
        assert not fits(problem, found)
    except PartitionError:
        assert not runs
        return
    else:
        assert fits(problem, found)
    validate(problem, found.stage, found.option)


@settings(max_examples=60, deadline=None)
@given(problems() | problems(chain=True) | light_problems())
def test_a_roomy_division_takes_no_longer_than_with_options_that_fit(problem: Problem) -> None:
    fit = [each for each in every_solution(problem) if fits(problem, each)]
    try:
        found = roomy_division(problem)
    except PartitionError:
        assert not in_runs(problem, fit)
        return
    same = (each.objective for each in fit if each.stage == found.stage)
    assert all(found.objective <= objective * (1 + 1e-9) for objective in same)


def test_a_roomy_division_fills_its_room() -> None:
    """Three have to take their other option: the third, of which a part would do, keeps its own."""
    ways = [(Option(1.0, 1.0), Option(1.0 + price, 0.0)) for price in (1.0, 1.5, 2.1, 2.15, 9.0)]
    problem = Problem(tuple(ways), tuple(itertools.pairwise(range(5))), 1, budget_bytes=(2.5,))
    found = roomy_division(problem)
    assert found.ranks_bytes == (3.0,)
    assert found.objective == 5.0 + 1.0 + 1.5 < solve(problem).objective


@pytest.mark.parametrize(("room", "objective"), [(10.0, 10.0), (11.0, 10.0), (14.0, 6.0)])
def test_stages_of_a_rank_share_its_memory_as_they_need(room: float, objective: float) -> None:
    """The first holds more than its half; what both leave goes to what is faster for it."""
    ways = Option(1.0, stash_bytes=3.0), Option(2.0, stash_bytes=1.0)
    heavy = tuple(replace(each, static_bytes=8.0) for each in ways)
    problem = Problem(
        (heavy, *[ways] * 3),
        tuple(itertools.pairwise(range(4))),
        4,
        homes=(0, 1, 0, 1),
        budget_bytes=(room, room),
        sum_weight=1.0,
        min_units=1,
    )
    found = solve(problem, solver="dynamic")
    assert fits(problem, found)
    assert found.objective == solve(problem).objective == objective

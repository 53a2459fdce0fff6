"""The dynamic program is exact on runs of units; simple strategies are never better."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from pipecompile.compiler.ir.errors import PartitionError
from pipecompile.compiler.ir.problem import Problem, fits, validate
from pipecompile.passes.partition import baselines
from pipecompile.passes.partition.baselines import solve_dynamic
from pipecompile.passes.partition.solve import solve
from support.problems import check_dynamic, every_solution, optimum, problems, reduced_or_none

SIMPLE = [
    baselines.solve_uniform,
    baselines.solve_parameters,
    baselines.solve_sequential,
    baselines.solve_all_or_nothing,
]


@settings(max_examples=60, deadline=None)
@given(problems() | problems(chain=True))
def test_the_dynamic_program_finds_the_best_division_into_runs(problem: Problem) -> None:
    if (reduced := reduced_or_none(problem)) is None:
        return
    problem = reduced.problem
    every = every_solution(problem)
    groups = baselines.in_order(problem)
    runs = [
        each
        for each in every
        if all(each.stage[a] <= each.stage[b] for (a, *_), (b, *_) in itertools.pairwise(groups))
    ]
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

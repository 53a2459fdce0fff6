"""Chains of ideals, with options and memory, against trying everything and the integer program."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from pipecompile.compiler.ir.problem import Problem, fits, solution_of
from pipecompile.passes.integer.work import Work
from pipecompile.passes.partition import lattice
from pipecompile.passes.partition.solve import solve
from support.networks import bert_operators, resnet
from support.problems import (
    diamonds,
    every_solution,
    light_problems,
    optimum,
    pinned_problems,
    problems,
    reduced_or_none,
)


def check_alone(problem: Problem) -> None:
    if (reduced := reduced_or_none(problem)) is None:
        return
    small = reduced.problem
    if not lattice.applies(small):
        return
    best = optimum(small, every_solution(small))
    for upper in (math.inf, best, best * 1.5):
        answer = lattice.minimise(small, upper, work=Work(60))
        assert answer is not None
        assert answer.bound == pytest.approx(best, rel=2e-6)
        if answer.stage is None or answer.option is None:
            assert upper <= best * (1 + 1e-6)
            continue
        found = solution_of(small, answer.stage, answer.option, "lattice")
        assert fits(small, found)
        assert found.objective == pytest.approx(best, rel=2e-6)


@settings(max_examples=60, deadline=None)
@given(problems() | light_problems() | pinned_problems())
def test_it_finds_the_best_of_all_assignments_alone(problem: Problem) -> None:
    check_alone(problem)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(problems() | light_problems() | pinned_problems())
def test_it_finds_the_best_of_many(problem: Problem) -> None:
    check_alone(problem)


@pytest.mark.parametrize("weights", [(1.0, 0.5), (7.0, 1.0), (0.0, 1.0)])
def test_it_agrees_with_the_integer_program(weights: tuple[float, float]) -> None:
    problem = replace(diamonds(3, 3, sizes=9), max_weight=weights[0], sum_weight=weights[1])
    by_program = solve(problem, solver="highs")
    assert by_program.proven
    answer = lattice.minimise(problem, math.inf, work=Work(60))
    assert answer is not None
    assert answer.bound == pytest.approx(by_program.objective, rel=5e-6)


@pytest.mark.parametrize(
    "case", [(16, 8.0), pytest.param((16, 2.6), marks=pytest.mark.slow), (32, 2.2)]
)
def test_layers_with_residuals_are_proven_on_many_stages(case: tuple[int, float]) -> None:
    """The integer program has gaps of 8 % and more after half a minute, or finds nothing."""
    problem = resnet(*case)
    found = solve(problem)
    assert (found.proven, found.solver, found.note) == (True, "lattice", "")
    assert fits(problem, found)
    assert {len(menu) for menu in problem.options} == {2}
    assert 0 < sum(found.option) < problem.n_units


@pytest.mark.parametrize("training", [False, True])
def test_operators_of_a_whole_model_are_proven(training: bool) -> None:
    """As an exporter writes them: joins of the batch with every layer, biases that are cast."""
    problem = bert_operators(12, training=training)
    found = solve(problem)
    assert (found.proven, found.note) == (True, "")
    assert found.solver == ("ideals" if training else "dynamic")
    assert fits(problem, found)


def test_orders_with_too_many_ideals_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lattice, "MOST_CELLS", 100.0)
    assert lattice.minimise(diamonds(3, 3), math.inf, work=Work(60)) is None

"""Partitioning: the dynamic program is exact, and what it returns is legal."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.errors import PartitionError
from pipecompile.compiler.hardware import CPU
from pipecompile.passes.baselines import solution_of, solve_dynamic, solve_uniform
from pipecompile.passes.partition import Problem, problem_of


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    n = draw(st.integers(1, 9))
    seconds = st.integers(1, 50).map(float)
    unit_s = tuple(draw(seconds) for _ in range(n))
    cut_s = tuple(draw(seconds) for _ in range(n))
    return Problem(unit_s, cut_s, draw(st.integers(1, n)), draw(st.integers(1, 12)))


@given(problems())
def test_the_dynamic_program_is_exact(problem: Problem) -> None:
    n, stages = len(problem.unit_s), problem.n_stages
    every = (solution_of(problem, (0, *cuts)) for cuts in combinations(range(1, n), stages - 1))
    best = min(solution.makespan_s for solution in every)
    assert solve_dynamic(problem).makespan_s == pytest.approx(best)


@given(problems())
def test_solutions_cover_every_unit_once(problem: Problem) -> None:
    for solve in (solve_dynamic, solve_uniform):
        solution = solve(problem)
        stages = [solution.stage_of(unit) for unit in range(len(problem.unit_s))]
        assert stages == sorted(stages)
        assert set(stages) == set(range(problem.n_stages))


def test_it_takes_the_largest_problem_in_seconds() -> None:
    problem = Problem((1.0, 2.0, 3.0) * 50, (0.5, 0.1, 0.7) * 50, 16, 32)
    assert solve_dynamic(problem).makespan_s <= solve_uniform(problem).makespan_s


def test_more_stages_than_units_is_refused() -> None:
    with pytest.raises(PartitionError, match=r"n_stages=3.*only 0 units"):
        problem_of([], CPU, 3, 1)

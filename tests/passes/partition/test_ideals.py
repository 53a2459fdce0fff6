"""The dynamic program over ideals is exact where it applies."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from pipecompile.compiler.ir.problem import Option, Problem, fits, solution_of
from pipecompile.passes.integer.work import Work
from pipecompile.passes.partition import ideals
from pipecompile.passes.partition.presolve import reduce
from support.problems import (
    check_against_all,
    every_solution,
    fitting,
    light_problems,
    plain_problems,
    reduced_or_none,
)


@settings(max_examples=100, deadline=None)
@given(plain_problems())
def test_free_units_and_ideals_keep_the_optimum(problem: Problem) -> None:
    check_against_all(problem)


@settings(max_examples=200, deadline=None)
@given(plain_problems() | light_problems())
def test_the_ideals_alone_find_the_best_of_all_assignments(problem: Problem) -> None:
    reduced = reduced_or_none(problem)
    if reduced is None or not ideals.applies(reduced.problem):
        return
    some = fitting(problem, every_solution(problem))
    best = some[-1].objective if some else math.inf
    for upper in (math.inf, *(each.objective for each in some)):
        answer = ideals.minimise_time(reduced.problem, upper, work=Work(math.inf))
        assert answer is not None
        assert answer.bound == pytest.approx(best)
        if answer.stage is None:
            assert upper == best
            continue
        option = (0,) * reduced.problem.n_units
        found = solution_of(problem, *reduced.lift(answer.stage, option), "ideals")
        assert fits(problem, found)
        assert found.objective == pytest.approx(answer.bound)


@settings(deadline=None)
@given(plain_problems())
def test_the_ideals_apply_to_plain_problems(problem: Problem) -> None:
    assert ideals.applies(reduce(problem).problem)


def test_the_ideals_take_an_upper_that_nothing_beats_for_the_bound() -> None:
    problem = Problem(tuple((Option(seconds),) for seconds in (7.0, 7.0, 7.0, 0.5)), (), 1)
    answer = ideals.minimise_time(problem, 21.5, work=Work(math.inf))
    assert answer is not None
    assert answer.stage is None
    assert answer.bound == 21.5

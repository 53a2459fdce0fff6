"""The integer program is exact, wherever it starts from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from pipecompile.compiler.ir.errors import PartitionError
from pipecompile.compiler.ir.problem import Problem, Solution, fits, solution_of
from pipecompile.passes.integer import ilp
from pipecompile.passes.integer.windows import windows
from pipecompile.passes.integer.work import Work
from pipecompile.passes.partition import dominance
from pipecompile.passes.partition.baselines import solve_dynamic
from pipecompile.passes.partition.lazy import largest_stage_s
from support.problems import (
    chain,
    check_against_all,
    every_solution,
    excess,
    fitting,
    light_problems,
    misleading,
    pinned_problems,
    problems,
    reduced_or_none,
    stale,
)


@settings(max_examples=60, deadline=None)
@given(problems() | light_problems())
def test_the_integer_program_alone_does(problem: Problem) -> None:
    def nothing(problem: Problem, **_: object) -> Solution:
        raise PartitionError("switched off")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipecompile.passes.partition.solve.solve_dynamic", nothing)
        check_against_all(problem, "highs")


@settings(max_examples=30, deadline=None)
@given(problems() | light_problems() | pinned_problems() | pinned_problems())
@example(misleading())
@example(stale())
def test_the_integer_program_finds_the_optimum_from_every_start(problem: Problem) -> None:
    check_starts(problem)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(problems() | pinned_problems() | pinned_problems())
def test_the_integer_program_finds_many_optima_from_every_start(problem: Problem) -> None:
    check_starts(problem)


def check_starts(problem: Problem) -> None:
    if (reduced := reduced_or_none(problem)) is None:
        return
    problem = dominance.contract(reduced).problem
    some = fitting(problem, every_solution(problem))
    for start in (None, *some[:12]):  # the worst ones first
        upper = start.objective if start else math.inf
        limits = windows(problem, largest_stage_s(problem, upper))
        if limits is None:
            assert not some
            return
        answer = ilp.minimise_time(
            problem,
            limits,
            (start.stage, start.option) if start else None,
            upper,
            solver="highs",
            work=Work(60),
        )
        assert answer.finished
        if answer.stage is None or answer.option is None:
            assert answer.bound == math.inf
            assert not some
            return
        found = solution_of(problem, answer.stage, answer.option, "highs")
        assert fits(problem, found)
        assert found.objective == pytest.approx(some[-1].objective, rel=1e-5)
        assert answer.bound == pytest.approx(some[-1].objective, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_integer_program_finds_the_smallest_excess_from_every_start(problem: Problem) -> None:
    if (reduced := reduced_or_none(problem)) is None:
        return
    problem = reduced.problem
    limits = windows(replace(problem, budget_bytes=()), math.inf)
    if limits is None or math.inf in problem.budget_bytes:
        return
    every = every_solution(problem)
    every.sort(key=lambda each: excess(problem, each.ranks_bytes), reverse=True)
    for start in (None, *every[:: len(every) // 4 + 1]):
        answer = ilp.minimise_excess(
            problem,
            limits,
            (start.stage, start.option) if start else None,
            solver="highs",
            work=Work(60),
        )
        if answer.stage is None or answer.option is None:
            assert answer.bound == math.inf
            assert not every
            return
        found = solution_of(problem, answer.stage, answer.option, "highs")
        least = pytest.approx(excess(problem, every[-1].ranks_bytes), rel=2e-3, abs=1e-4)
        assert excess(problem, found.ranks_bytes) == least
        assert answer.bound == least


def test_the_integer_program_agrees_with_the_dynamic_one() -> None:
    problem = chain(8, 3, budget_gib=16)
    limits = windows(problem, math.inf)
    assert limits is not None
    answer = ilp.minimise_time(problem, limits, None, math.inf, solver="highs", work=Work(60))
    assert answer.stage is not None
    assert answer.option is not None
    found = solution_of(problem, answer.stage, answer.option, "highs")
    best = solve_dynamic(problem)
    assert best.proven
    assert found.objective == pytest.approx(best.objective, rel=1e-5)
    assert answer.bound <= best.objective * (1 + 1e-6)

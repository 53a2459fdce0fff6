"""No solution that is as good as asked for is outside of the windows."""

from __future__ import annotations

import math

from hypothesis import given, settings
from pipecompile.compiler.ir.problem import Problem
from pipecompile.passes.partition import baselines, dominance
from pipecompile.passes.partition.solve import _inside, _simple_bound
from pipecompile.passes.partition.windows import windows
from support.problems import every_solution, fitting, light_problems, problems, reduced_or_none


@settings(max_examples=60, deadline=None)
@given(problems() | light_problems())
def test_windows_and_the_simple_bound_leave_every_solution_that_is_as_good(
    problem: Problem,
) -> None:
    if (reduced := reduced_or_none(problem)) is None:
        return
    problem = dominance.contract(reduced).problem
    some = fitting(problem, every_solution(problem))
    for upper in (math.inf, *(each.objective for each in some)):
        limit_s = baselines.largest_stage_s(problem, upper)
        limits = windows(problem, limit_s)
        for each in some:
            if each.objective <= upper:
                assert max(each.stages_s) <= limit_s
                assert limits is not None
                assert _inside(each.stage, limits)
    assert all(_simple_bound(problem) <= each.objective * (1 + 1e-9) for each in some)

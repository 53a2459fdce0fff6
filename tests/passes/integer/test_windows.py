"""No solution that is as good as asked for is outside of the windows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from pipecompile.compiler.ir.problem import Option, Problem
from pipecompile.passes.integer.windows import Window, windows
from pipecompile.passes.partition import dominance
from support.problems import (
    check_bounds,
    every_solution,
    fitting,
    light_problems,
    problems,
    reduced_or_none,
)


@settings(max_examples=60, deadline=None)
@given(problems() | light_problems())
def test_windows_and_the_simple_bound_leave_every_solution_that_is_as_good(
    problem: Problem,
) -> None:
    if (reduced := reduced_or_none(problem)) is None:
        return
    problem = dominance.contract(reduced).problem
    check_bounds(problem, fitting(problem, every_solution(problem)))


def row(*units: tuple[Option, ...], **more: Any) -> Problem:
    """A chain on two stages."""
    return Problem(units, tuple(itertools.pairwise(range(len(units)))), 2, **more)


FOUR = (Option(0.0, static_bytes=4.0),)
EITHER = (Option(2.0), Option(1.0, static_bytes=1.0))


@pytest.mark.parametrize(
    ("problem", "limit_s", "stages"),
    [
        (row(FOUR, FOUR, FOUR, budget_bytes=(8.0, 4.0)), math.inf, [(0, 0), (0, 0), (1, 1)]),
        (row(FOUR, FOUR, FOUR, budget_bytes=(4.0, 8.0)), math.inf, [(0, 0), (1, 1), (1, 1)]),
        (row(FOUR, FOUR, budget_bytes=(8.0, math.inf)), math.inf, [(0, 1), (0, 1)]),
        (
            row(FOUR, FOUR, FOUR, budget_bytes=(10.0, 10.0), reserve_bytes=(2.0, 6.0)),
            math.inf,
            [(0, 0), (0, 0), (1, 1)],
        ),
        (
            row(*((Option(0.0, stash_bytes=4.0),),) * 3, in_flight=(2, 1), budget_bytes=(8.0, 8.0)),
            math.inf,
            [(0, 0), (0, 1), (1, 1)],
        ),
        (row(EITHER, EITHER, EITHER), 2.0, [(0, 0), (0, 1), (1, 1)]),
        (row(EITHER, EITHER, EITHER), 3.0, [(0, 1), (0, 1), (0, 1)]),
        (row(EITHER, EITHER, EITHER, min_units=1), math.inf, [(0, 0), (0, 1), (1, 1)]),
        (row(EITHER, EITHER, EITHER, pins={1: 1}), math.inf, [(0, 1), (1, 1), (1, 1)]),
        (
            Problem((EITHER,) * 3, (), 2, together=((0, 1),), pins={1: 1}),
            math.inf,
            [(1, 1), (1, 1), (0, 1)],
        ),
        (
            Problem((EITHER,) * 4, ((0, 2),), 2, together=((0, 1), (2, 3))),
            2.0,
            [(0, 0), (0, 0), (1, 1), (1, 1)],
        ),
    ],
    ids=[
        "small last stage",
        "small first stage",
        "one budget",
        "reserves",
        "fewer in flight",
        "seconds",
        "more seconds",
        "fewest units",
        "pin",
        "pin in a group",
        "groups in a row",
    ],
)
def test_windows_are_as_wide_as_they_have_to_be(
    problem: Problem, limit_s: float, stages: list[Window]
) -> None:
    assert windows(problem, limit_s) == stages

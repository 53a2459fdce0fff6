"""Strategies beside a plan, at one problem's prices: numbers that can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from pipecompile.compiler.ir.errors import OptionError
from pipecompile.compiler.ir.problem import Option, Problem
from pipecompile.compiler.plan.decision import Decision, Search
from pipecompile.compiler.report.compare import (
    STRATEGIES,
    calibrated,
    check_names,
    compare,
    solution_in,
)
from support.plans import hand_made

# Four units in a row, 10 s together; the last may halve its stash for 1 s more.
SECONDS = (1.0, 1.0, 2.0, 6.0)
CHAIN = Problem(
    options=(
        *((Option(s, stash_bytes=10.0, static_bytes=100.0 * s),) for s in SECONDS[:3]),
        (Option(6.0, 10.0, 100.0, name="nothing"), Option(7.0, 5.0, 100.0, name="matmul")),
    ),
    edges=((0, 1), (1, 2), (2, 3)),
    n_stages=2,
    in_flight=(2, 1),
    max_weight=3.0,
    sum_weight=1.0,
    min_units=1,
)


def decision(stage: tuple[int, ...], last: tuple[float, float, float]) -> Decision:
    seconds = (*((s, 0.0, 0.0) for s in SECONDS[:3]), last)
    search = Search(0.0, 0.0, True, "dynamic")
    return Decision("", (1,) * 4, stage, ("nothing",) * 4, seconds, (), search)


BEST = decision((0, 0, 0, 1), (2.0, 4.0, 0.0))


def test_rows() -> None:
    own, uniform, parameters, *others = compare(CHAIN, BEST, tuple(STRATEGIES))
    assert (own.name, own.units, own.bottleneck_s, own.step_s) == ("this plan", (3, 1), 6.0, 28.0)
    assert (own.ratio, own.fits, own.over_bytes) == (1.0, True, 0.0)
    assert (own.peak_bytes, own.peak_rank) == (400 + 2 * 30, 0)
    assert (uniform.units, uniform.bottleneck_s, uniform.step_s) == ((2, 2), 8.0, 34.0)
    assert uniform.ratio == 34 / 28
    assert (parameters.units, parameters.peak_bytes) == ((2, 2), 300 + 20)
    assert [row.step_s for row in others] == [28.0] * 3
    assert [row.name for row in others] == ["sequential", "all-or-nothing", "dynamic"]


def test_budgets_are_checked() -> None:
    limited = replace(CHAIN, budget_bytes=(450.0, 450.0))
    own, uniform = compare(limited, BEST, ["uniform"])
    assert (own.fits, own.over_bytes) == (False, 10.0)
    assert uniform.fits


def test_others_have_the_reserves_of_all_that_was_tried() -> None:
    limited = replace(CHAIN, budget_bytes=(470.0, 470.0))
    asked = replace(limited, reserve_bytes=(0.0, 200.0))
    own, uniform = compare(limited, BEST, ["uniform"])
    assert own.fits
    assert uniform.fits
    again, refused = compare(limited, BEST, ["uniform"], asked)
    assert again == own
    assert not refused.fits
    assert refused.peak_bytes == 320 + 200


def test_what_is_impossible_says_why() -> None:
    pinned = replace(CHAIN, pins={1: 1})
    row = compare(pinned, decision((0, 1, 1, 1), (2.0, 4.0, 0.0)), ["uniform"])[1]
    assert row.reason == "unit 1 is pinned to stage 1"
    assert not row.fits
    cramped = replace(CHAIN, budget_bytes=(1.0, 1.0))
    assert compare(cramped, BEST, ["dynamic"])[1].reason


def test_a_decision_names_its_options_by_their_seconds() -> None:
    assert solution_in(CHAIN, BEST).option == (0, 0, 0, 0)
    recomputing = solution_in(CHAIN, decision((0, 0, 0, 1), (2.0, 4.0, 1.0)))
    assert recomputing.option == (0, 0, 0, 1)
    assert recomputing.ranks_bytes == (460.0, 105.0)


def test_calibration_gives_a_plan_its_own_bytes() -> None:
    plan, _ = hand_made()
    plan = replace(plan, decision=BEST)
    fitted = calibrated(CHAIN, plan)
    peaks = [float(stage.memory.peak) for stage in plan.stages]
    assert list(solution_in(fitted, BEST).ranks_bytes) == peaks
    again = calibrated(fitted, plan)
    assert again.reserve_bytes == fitted.reserve_bytes
    assert math.isinf(fitted.budget_bytes[0])


def test_names_are_checked() -> None:
    check_names(["uniform", "dynamic"])
    with pytest.raises(OptionError, match="'unifrm': known are uniform, parameters, sequential"):
        check_names(["unifrm"])
    with pytest.raises(OptionError, match="uniform twice"):
        check_names(["uniform", "uniform"])

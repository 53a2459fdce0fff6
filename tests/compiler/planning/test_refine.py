"""The local search on the simulated step: never worse, legal, and better where the formula errs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.ir.errors import PartitionError
from pipecompile.compiler.ir.problem import Option, Problem, Value, fits, validate
from pipecompile.compiler.planning.refine import LEAST_GAIN, StepModel, refine
from pipecompile.compiler.units.pricing import UnitPrices
from pipecompile.passes.partition.solve import solve
from pipecompile.passes.schedule.registry import SCHEDULES


def model_of(
    seconds: list[float],
    sizes: list[float],
    ranks: int,
    microbatches: int,
    schedule: str = "1f1b",
    link_s: float = 0.0,
    budget: float = math.inf,
) -> StepModel:
    """A chain of units, whose backward takes twice as long, and what goes from one to the next."""
    kind = SCHEDULES[schedule]
    shape = kind.shape(ranks, microbatches)
    load = kind.load(shape)
    problem = Problem(
        tuple((Option(3 * s, 1.0, 1.0),) for s in seconds),
        tuple((u, u + 1) for u in range(len(seconds) - 1)),
        shape.n_stages,
        tuple(
            Value(a, (b,), receive_s=size * link_s)
            for u, size in enumerate(sizes)
            for a, b in ((u, u + 1), (u + 1, u))
        ),
        homes=shape.homes,
        in_flight=load.in_flight,
        together_in_flight=load.together,
        budget_bytes=(budget,) * ranks,
        max_weight=microbatches - load.idle,
        sum_weight=load.idle,
        min_units=1,
    )
    prices = [UnitPrices(s, 2 * s, (0.0,)) for s in seconds]
    return StepModel(problem, kind, shape, prices)


SECONDS = st.lists(st.integers(1, 9).map(float), min_size=4, max_size=9)


@settings(max_examples=40, deadline=None)
@given(
    SECONDS,
    st.integers(2, 4),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from([math.inf, 30.0, 12.0]),
    st.sampled_from(["1f1b", "zb_h1"]),
)
def test_it_is_never_worse_and_stays_legal(
    seconds: list[float], ranks: int, microbatches: int, link_s: float, budget: float, name: str
) -> None:
    sizes = [s % 4 for s in seconds[1:]]
    model = model_of(seconds, sizes, ranks, microbatches, name, link_s, budget)
    try:
        solution = solve(model.problem)
    except PartitionError:
        return
    found, saved = refine(model, solution)
    validate(model.problem, found.stage, found.option)
    assert fits(model.problem, found)
    before, after = (model.step_s(x.stage, x.option) for x in (solution, found))
    assert after <= before
    assert saved == pytest.approx(1 - after / before)
    assert (found is solution) == (saved == 0.0)


def test_transfers_that_hide_are_not_avoided() -> None:
    """The formula pays in full what the simulator sees to run beside computation."""
    model = model_of([1.0, 4.0, 2.0, 3.0], [0.0, 8.0, 1.0], 3, 16, link_s=0.5)
    solution = solve(model.problem)
    assert solution.stage == (0, 1, 1, 2)  # not between the second unit and the third
    found, saved = refine(model, solution)
    assert found.stage == (0, 0, 1, 2)
    assert saved > 0.12
    assert found.objective > solution.objective


def test_what_is_hardly_better_is_left() -> None:
    seconds = [1.0] * 8
    model = model_of(seconds, [0.0] * 7, 4, 16)
    solution = solve(model.problem)
    assert refine(model, solution) == (solution, 0.0)
    assert LEAST_GAIN < 0.01


def test_many_microbatches_are_told_from_few() -> None:
    """The simulated part and what repeats add up to the whole, where stages are alike."""
    model = model_of([1.0] * 4, [0.0] * 3, 4, 200)
    assert model.few.microbatches == 16
    assert model.step_s((0, 1, 2, 3), (0,) * 4) == pytest.approx(3.0 * (200 + 3))

"""Engine, timing and limits of the search."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.ir.errors import OptionError
from pipecompile.passes.generators.sequenced import order_of, problem_of, schedule_of
from pipecompile.passes.generators.shape import PipelineShape, v_shaped
from pipecompile.passes.sequencing.greedy import Policy, greedy
from pipecompile.passes.sequencing.polish import polished
from pipecompile.passes.sequencing.problem import B, F, Problem, W
from pipecompile.passes.sequencing.search import best_order
from pipecompile.passes.sequencing.timing import times_of
from support.shapes import timeline, unequal

PLAIN = Policy(lambda s, i: (-s, i), lambda s, i: (-s, i), 0.1, 0.0, 0.5)


def alike(ranks: int, microbatches: int, limit: float) -> Problem:
    ones = (1.0,) * ranks
    limits = (limit,) * ranks
    homes = tuple(range(ranks))
    return Problem(homes, microbatches, (True,) * ranks, ones, ones, ones, ones, ones, limits)


@st.composite
def shapes(draw: st.DrawFn) -> PipelineShape:
    """Any placement, and limits from the least on."""
    ranks, virtual = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    homes = v_shaped(ranks, virtual)
    homes = tuple(draw(st.permutations(homes)))
    splits = tuple(draw(st.booleans()) for _ in homes)
    return PipelineShape(homes, draw(st.integers(1, 8)), splits, draw(unequal(homes)))


@settings(max_examples=200)
@given(shapes(), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_greedy_order_ends_with_any_limit_that_holds_one_microbatch(
    shape: PipelineShape, part: float, slack: float
) -> None:
    problem = problem_of(shape)
    deep, wide = (lambda s, i: (-s, i)), (lambda s, i: (s, i))
    for key in (deep, wide):
        order = greedy(problem, Policy(key, deep, part, part, slack))
        assert order is not None
        assert problem.fits(order)
        assert times_of(problem, order) is not None


@settings(max_examples=50)
@given(shapes())
def test_times_are_those_of_the_simulator(shape: PipelineShape) -> None:
    problem = problem_of(shape)
    order = greedy(problem, PLAIN)
    assert order is not None
    times = times_of(problem, order)
    assert times is not None
    simulated = timeline(schedule_of(order), shape)
    assert times.longest_s == pytest.approx(simulated.makespan_s)
    assert times.ends == [[x.end_s for x in row] for row in simulated.ranks]
    assert order_of(schedule_of(order)) == order


@settings(max_examples=25)
@given(shapes())
def test_polishing_never_makes_an_order_worse(shape: PipelineShape) -> None:
    problem = problem_of(shape)
    order = greedy(problem, PLAIN)
    assert order is not None
    times = times_of(problem, order)
    assert times is not None
    span, better = polished(problem, order, 30)
    assert span <= times.span
    assert problem.fits(better)
    assert [sorted(row) for row in better] == [sorted(row) for row in order]


def test_polishing_moves_a_w_out_of_the_way() -> None:
    """The last rank's W keeps the first one waiting."""
    problem = alike(2, 2, 9)
    slow = (
        ((F, 0, 0), (F, 0, 1), (B, 0, 0), (W, 0, 0), (B, 0, 1), (W, 0, 1)),
        ((F, 1, 0), (B, 1, 0), (W, 1, 0), (F, 1, 1), (B, 1, 1), (W, 1, 1)),
    )
    before = times_of(problem, slow)
    assert before is not None
    assert before.longest_s == 8
    assert polished(problem, slow, 20)[0][0] == 7


def test_an_order_that_waits_for_itself_has_no_times() -> None:
    problem = replace(alike(2, 1, 9), splits=(False, False))
    circle = (((B, 0, 0), (F, 0, 0)), ((F, 1, 0), (B, 1, 0)))
    assert times_of(problem, circle) is None


def test_what_is_held_is_counted_to_the_end_of_w() -> None:
    problem = replace(alike(1, 2, 9), stash_bytes=(5.0,), carry_bytes=(3.0,))
    early = ((F, 0, 0), (B, 0, 0), (W, 0, 0), (F, 0, 1), (B, 0, 1), (W, 0, 1))
    late = ((F, 0, 0), (B, 0, 0), (F, 0, 1), (B, 0, 1), (W, 0, 0), (W, 0, 1))
    assert [problem.peak_bytes(order) for order in (early, late)] == [5, 8]


def test_more_carried_than_stashed_counts_for_the_least() -> None:
    problem = replace(alike(2, 3, 9), stash_bytes=(5.0, 5.0), carry_bytes=(7.0, 1.0))
    assert problem.least_bytes == (7, 5)
    tight = replace(problem, limit_bytes=(7.0, 5.0))
    assert problem.fits(best_order(tight))
    with pytest.raises(OptionError, match=r"rank 0 may hold 6 bytes .* one of them takes 7"):
        best_order(replace(problem, limit_bytes=(6.0, 5.0)))


def test_a_distant_stage_waits_for_its_own_message() -> None:
    problem = replace(alike(3, 1, 9), transfers=((0, 2, 50.0),))
    times = times_of(problem, best_order(problem))
    assert times is not None
    assert times.starts[2][0] == 51


def test_more_memory_is_not_worse() -> None:
    spans = []
    for limit in (1, 2, 4, 8):
        times = times_of(alike(4, 8, limit), best_order(alike(4, 8, limit)))
        assert times is not None
        spans.append(times.longest_s)
    assert spans == sorted(spans, reverse=True)
    assert spans[-1] == 24


@pytest.mark.slow
def test_a_large_problem_does_not_take_long() -> None:
    n = 128
    ones = (1.0,) * n
    problem = Problem(
        tuple(range(64)) * 2, 512, (True,) * n, ones, ones, ones, ones, ones, (200.0,) * 64
    )
    assert problem.fits(best_order(problem))

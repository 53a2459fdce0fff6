"""The search against what a solver proves, on small problems."""

from __future__ import annotations

import pytest
from pipecompile.passes.sequencing.exact import proven
from pipecompile.passes.sequencing.problem import Problem
from pipecompile.passes.sequencing.search import best_order
from pipecompile.passes.sequencing.timing import times_of
from support.sequences import drawn, one_by_one

SMALL = [(p, m) for p in (2, 3) for m in (2, 3, 4)]


@pytest.mark.parametrize(("ranks", "microbatches"), SMALL)
def test_the_search_finds_the_best_order_of_small_problems(ranks: int, microbatches: int) -> None:
    for seed in range(2):
        problem = drawn(seed, ranks, 1, microbatches)
        order = best_order(problem)
        times = times_of(problem, order)
        assert times is not None
        proof = proven(problem, order, 20)
        gap = times.longest_s / proof.bound_s - 1
        print(f"p={ranks} m={microbatches}: {times.longest_s} s, at least {proof.bound_s:.3f} s")
        assert gap <= 0.03


@pytest.mark.parametrize("by_end", [False, True])
def test_the_solver_finds_what_the_search_finds(by_end: bool) -> None:
    """From a poor start, under a limit, and for both measures."""
    problem = drawn(1, 2, 1, 3, by_end)
    start = one_by_one(problem)
    proof = proven(problem, start, 20)
    assert proof.gap <= 1e-5
    assert problem.fits(proof.order)
    found, first = times_of(problem, best_order(problem)), times_of(problem, start)
    assert found is not None
    assert first is not None
    assert proof.seconds == pytest.approx(found.span[0])
    assert proof.seconds < first.span[0]


def test_a_limit_makes_the_best_order_longer() -> None:
    wide = drawn(3, 2, 1, 3)
    whole = tuple(map(float, (99, 99)))
    spans = []
    for limits in (whole, wide.least_bytes):
        problem = Problem(**{**fields(wide), "limit_bytes": limits})
        spans.append(proven(problem, best_order(problem), 20).seconds)
    assert spans[0] < spans[1]


def fields(problem: Problem) -> dict[str, object]:
    return {name: getattr(problem, name) for name in problem.__dataclass_fields__}


def test_what_is_too_large_to_prove_is_refused() -> None:
    problem = drawn(0, 4, 1, 40)
    with pytest.raises(ValueError, match="steps are too many to prove"):
        proven(problem, best_order(problem, effort=1000), 1)

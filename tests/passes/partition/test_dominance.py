"""Merging units with neighbours, and leaving options out, keeps the optimum."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from pipecompile.compiler.ir.errors import PartitionError
from pipecompile.compiler.ir.problem import Kept, Option, Problem, Users, Value
from pipecompile.passes.partition import dominance
from pipecompile.passes.partition.presolve import reduce
from pipecompile.passes.partition.solve import solve
from support.problems import every_solution, optimum

PROBLEMS = 3000


def test_constants_and_reshapes_are_merged() -> None:
    """0: matmul, 1: reshape of it, 2: matmul that reads that and a constant, 3."""
    options = tuple((Option(seconds),) for seconds in (3.0, 0.0, 4.0, 0.0))
    values = tuple(Value(u, (v,), 1.0, 1.0) for u, v in ((0, 1), (1, 2), (3, 2)))
    problem = Problem(options, ((0, 1), (1, 2), (3, 2)), 2, values)
    smaller = dominance.contract(reduce(problem))
    assert sorted(map(sorted, smaller.members)) in ([[0], [1, 2, 3]], [[0, 1], [2, 3]])
    assert solve(problem).objective == 5.0


SENT_BACK = Problem(
    tuple((Option(seconds),) for seconds in (5.0, 1.0, 1.0)),
    ((1, 2),),
    2,
    (Value(1, (0,), 1.0, 2.0), Value(1, (2,), 0.0, 5.0)),
)
READ_TOO = Problem(
    tuple((Option(seconds),) for seconds in (5.0, 0.0, 10.0)),
    ((1, 2),),
    2,
    (Value(2, (0, 1), 0.0, 5.0), Value(1, (0,), 0.0, 2.0)),
)
READ_BY_ALL = Problem(
    tuple((Option(seconds),) for seconds in (5.0, 0.0, 5.0, 5.0)),
    ((1, 2), (2, 3)),
    2,
    (Value(3, (0, 1, 2), 0.0, 5.0), Value(1, (0,), 0.0, 2.0)),
)


@pytest.mark.parametrize(
    ("problem", "best"), [(SENT_BACK, 6.0), (READ_TOO, 10.0), (READ_BY_ALL, 10.0)]
)
def test_a_unit_stays_with_those_that_read_the_same(problem: Problem, best: float) -> None:
    """Unit 1 would have to send what unit 0 now reads beside it."""
    assert optimum(problem, every_solution(problem)) == best
    assert solve(problem).objective == best


def reshape(first: Option, **more: Any) -> Problem:
    """Unit 0 takes no time, and unit 1 has to follow it; where 1 is, 2 bytes are left."""
    default: dict[str, Any] = {"n_stages": 2, "edges": ((0, 1),), "budget_bytes": (10.0, 10.0)}
    return Problem(((first,), (Option(1.0, static_bytes=8.0),)), **(default | more))


FREE = Option(0.0)
PEAK = Option(0.0, transient_bytes=4.0)
ALONE = (Option(3.0),)


@pytest.mark.parametrize(
    ("problem", "best"),
    [
        (Problem((ALONE, (FREE,), ALONE), ((1, 2),), 2, pins={0: 0, 1: 0}), 3.0),
        (reshape(Option(0.0, static_bytes=4.0)), 1.0),
        (reshape(Option(0.0, stash_bytes=2.0), in_flight=(2, 2)), 1.0),
        (reshape(PEAK), 1.0),
        (reshape(FREE, kept=(Kept(4.0, ((0, None),)),)), 1.0),
        (reshape(PEAK, edges=((1, 0),), pins={1: 0}, budget_bytes=(10.0, math.inf)), 1.0),
        (
            Problem(
                ((FREE,), (Option(1.0, static_bytes=8.0),), (Option(1.0),)),
                ((0, 1),),
                2,
                kept=(Kept(4.0, ((2, None),), unless=((0, None),)),),
                budget_bytes=(3.0, 10.0),
            ),
            1.0,
        ),
    ],
    ids=["pin", "static", "stash", "transient", "shared", "one budget", "spares shared"],
)
def test_a_unit_that_is_pinned_or_has_bytes_stays(problem: Problem, best: float) -> None:
    """Its neighbour's stage has no room for it, or it is needed where it is."""
    assert optimum(problem, every_solution(problem)) == best
    assert solve(problem).objective == best


def dense(seed: int) -> Problem:
    """Few units that share much: nearly every part of the problem decides for some seed.

    Half of them have units with two options, and shared bytes; of the others, with one, most have
    something that is limited.
    """
    rng = random.Random(seed)
    several = bool(seed % 2)
    n, stages = rng.randint(2, 3) if several else rng.randint(3, 4), rng.randint(2, 3)
    limited = several or rng.random() < 0.6
    few = (0.0, 0.0, 1.0, 2.0, 5.0)

    def option() -> Option:
        sizes = [0.0, 0.0, 0.0]
        if limited and rng.random() < (0.3 if several else 0.6):
            sizes[rng.randrange(3)] = rng.choice((3.0, 4.0))
        return Option(rng.choice(few), *sizes)

    options = tuple(
        tuple(option() for _ in range(rng.randint(1, 2) if several else 1)) for _ in range(n)
    )

    def users(most: int) -> Users:
        chosen = rng.sample(range(n), rng.randint(0, most))
        return tuple(
            (u, rng.choice((None, *(frozenset({k}) for k in range(len(options[u]))))))
            for u in chosen
        )

    edges = tuple((u, v) for u in range(n) for v in range(u + 1, n) if rng.random() < 0.45)
    values = tuple(
        Value(rng.randrange(n), tuple(rng.sample(range(n), rng.randint(1, 2))), send, receive)
        for _ in range(0 if limited and rng.random() < 0.5 else rng.randint(1, 4))
        for send, receive in [(rng.choice(few), rng.choice(few))]
    )
    kept = tuple(
        Kept(rng.choice((2.0, 5.0)), users(2), rng.random() < 0.5, users(2))
        for _ in range(rng.randint(several, 2) if limited else 0)
    )
    budgets = [rng.choice((3.0, 5.0, 8.0, 12.0)) if limited else math.inf for _ in range(stages)]
    if rng.random() < 0.2:
        budgets[rng.randrange(stages)] = math.inf
    pins = {rng.randrange(n): rng.randrange(stages)} if rng.random() < 0.3 else {}
    return Problem(
        options,
        edges,
        stages,
        values,
        kept,
        pins=pins,
        in_flight=tuple(rng.randint(1, 2) for _ in range(stages)),
        budget_bytes=tuple(budgets),
        sum_weight=rng.choice((0.0, 1.0)),
        together=(tuple(rng.sample(range(n), 2)),) if rng.random() < 0.1 else (),
        min_units=int(rng.random() < 0.1),
    )


def test_what_is_left_has_the_optimum_of_all_assignments() -> None:
    """Many small problems, each solved by trying everything, before and after."""
    for seed in range(PROBLEMS):
        problem = dense(seed)
        try:
            smaller = dominance.contract(reduce(problem)).problem
        except PartitionError:  # pins that the edges contradict
            assert not every_solution(problem), seed
            continue
        best = optimum(problem, every_solution(problem))
        assert optimum(smaller, every_solution(smaller)) == pytest.approx(best), seed

"""Partitioning problems, drawn and hand-made, and the answers that trying everything gives."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import strategies as st
from pipecompile.compiler.ir.errors import MemoryBudgetError, PartitionError
from pipecompile.compiler.ir.problem import (
    Kept,
    Link,
    Option,
    Problem,
    Solution,
    Users,
    Value,
    fits,
    solution_of,
    validate,
)
from pipecompile.passes.integer.windows import windows
from pipecompile.passes.partition.baselines import solve_dynamic
from pipecompile.passes.partition.lazy import largest_stage_s
from pipecompile.passes.partition.presolve import Reduced, reduce
from pipecompile.passes.partition.solve import _inside, _simple_bound, solve

GIB = 2.0**30
SMALL = st.just(0.0) | st.integers(0, 9).map(float)


@st.composite
def problems(draw: st.DrawFn, *, chain: bool = False) -> Problem:
    """Small ones: every part of a problem is drawn, and much of it is zero or missing.

    The edges leave several components as often as not; the numbers of the units say nothing of
    their order. Half of the pins are those of a division that keeps to the edges.
    """
    n, stages = draw(st.integers(2, 6)), draw(st.integers(1, 3))
    units, places = st.integers(0, n - 1), st.integers(0, stages - 1)
    counts = draw(st.sampled_from([(1,), (1, 1, 2), (2, 1, 3), (1, 4, 1, 1)]))
    options = draw(some_options(n, counts))
    order = list(range(n)) if chain else draw(st.permutations(range(n)))
    pairs = list(itertools.combinations(order, 2))
    edges = itertools.pairwise(order) if chain else draw(st.lists(st.sampled_from(pairs)))
    edges = list(edges)[: 2 * n]
    readers = st.lists(units, min_size=1, max_size=3, unique=True).map(tuple)

    def users(least: int) -> Users:
        found = draw(st.lists(units, min_size=least, max_size=2))
        which = {u: st.frozensets(st.integers(0, len(options[u]) - 1), min_size=1) for u in found}
        return tuple((u, draw(st.none() | which[u])) for u in found)

    several = range(draw(st.integers(0, 2)))
    kept = [Kept(draw(SMALL), users(1), draw(st.booleans()), users(0)) for _ in several]
    pins = draw(st.dictionaries(units, places, max_size=1))
    if draw(st.booleans()):
        pins = draw(some_pins(order, edges, stages))
    group = st.lists(units, min_size=2, max_size=3, unique=True).map(tuple)
    max_weight, sum_weight = draw(st.sampled_from([(1.0, 0.0), (3.0, 1.0), (0.0, 1.0)]))
    return Problem(
        options,
        tuple(edges),
        stages,
        tuple(draw(st.lists(st.builds(Value, units, readers, SMALL, SMALL), max_size=3))),
        tuple(kept),
        together=() if chain else tuple(draw(st.lists(group, max_size=2))),
        pins=pins,
        in_flight=tuple(draw(st.integers(1, 3)) for _ in range(stages)),
        budget_bytes=tuple(
            draw(st.integers(0, 60).map(float) | st.sampled_from([10.0, 20.0, math.inf]))
            for _ in range(stages)
        ),
        reserve_bytes=tuple(draw(st.sampled_from([0.0, 2.0])) for _ in range(stages)),
        max_weight=max_weight,
        sum_weight=sum_weight,
        min_units=draw(st.integers(0, 2)),
    )


@st.composite
def shared_problems(draw: st.DrawFn) -> Problem:
    """As `problems`, on ranks that hold several stages."""
    problem = draw(problems())
    ranks = draw(st.integers(1, problem.n_stages))
    others = st.integers(0, ranks - 1)
    given = [draw(others) for _ in range(problem.n_stages - ranks)]
    homes = tuple(draw(st.permutations([*range(ranks), *given])))
    apart = replace(problem, homes=homes, budget_bytes=(), reserve_bytes=(), together_in_flight=())
    counts = st.integers(0, 3)
    several = st.lists(counts, min_size=1, max_size=2).map(len)
    together = tuple(
        tuple(tuple(draw(counts) for _ in stages) for _ in range(draw(several)))
        for stages in apart.placement
    )
    most = {
        s: max(counts)
        for stages, moments in zip(apart.placement, together, strict=True)
        for s, counts in zip(stages, zip(*moments, strict=True), strict=True)
    }
    return replace(
        apart,
        in_flight=tuple(most[s] for s in range(problem.n_stages)),
        together_in_flight=together,
        budget_bytes=tuple(
            draw(st.integers(0, 90).map(float) | st.sampled_from([20.0, 40.0, math.inf]))
            for _ in range(ranks)
        ),
        reserve_bytes=tuple(draw(st.sampled_from([0.0, 2.0])) for _ in range(ranks)),
    )


@st.composite
def unlike_problems(
    draw: st.DrawFn, some: st.SearchStrategy[Problem], *, links: bool = True
) -> Problem:
    """The same on up to three kinds of devices, over links of which no two are alike.

    Args:
        links: whether these are drawn too, half of the time.
    """
    problem = draw(some)
    count, ranks = draw(st.integers(1, 3)), problem.n_ranks
    seconds = st.tuples(*[SMALL] * count)
    link = st.builds(Link, st.sampled_from([0.5, 1.0, 1.0, 2.0, 3.5]), st.sampled_from([0.0, 1.0]))
    row = st.tuples(*[link] * ranks)
    return replace(
        problem,
        options=tuple(
            tuple(replace(option, by_kind=draw(seconds)) for option in each)
            for each in problem.options
        ),
        kinds=tuple(draw(st.integers(0, count - 1)) for _ in range(ranks)),
        links=draw(st.tuples(*[row] * ranks)) if links and draw(st.booleans()) else (),
    )


def some_options(
    n: int, counts: Sequence[int]
) -> st.SearchStrategy[tuple[tuple[Option, ...], ...]]:
    one = st.builds(Option, SMALL, SMALL, SMALL, st.sampled_from([0.0, 3.0, 5.0]))
    return st.tuples(*(st.tuples(*[one] * counts[u % len(counts)]) for u in range(n)))


@st.composite
def some_pins(
    draw: st.DrawFn, order: Sequence[int], edges: Sequence[tuple[int, int]], stages: int
) -> dict[int, int]:
    """Of up to three units, as a division that keeps to the edges has them."""
    home = {u: draw(st.integers(0, stages - 1)) for u in order}
    for v in order:
        home[v] = max(home[v], *(home[u] for u, w in edges if w == v), 0)
    pinned = draw(st.sets(st.sampled_from(order), min_size=1, max_size=3))
    return {u: home[u] for u in pinned}


@st.composite
def pinned_problems(draw: st.DrawFn) -> Problem:
    """Pins, options, memory and fewest units: the integer program has much to presolve."""
    n, stages = draw(st.integers(4, 6)), draw(st.integers(2, 3))
    pairs = list(itertools.combinations(range(n), 2))
    edges = draw(st.lists(st.sampled_from(pairs), max_size=4))
    return Problem(
        draw(some_options(n, draw(st.sampled_from([(1, 1, 2), (2, 1, 3)])))),
        tuple(edges),
        stages,
        pins=draw(some_pins(range(n), edges, stages)),
        budget_bytes=(draw(st.sampled_from([20.0, 30.0, 40.0])),) * stages,
        sum_weight=draw(st.sampled_from([0.0, 1.0, 1.0])),
        min_units=draw(st.integers(1, 2)),
    )


@st.composite
def plain_problems(draw: st.DrawFn) -> Problem:
    """One option per unit; many units and values cost nothing, as constants and reshapes do."""
    n, stages = draw(st.integers(2, 6)), draw(st.integers(1, 3))
    few = st.sampled_from([0.0, 0.0, 1.0, 2.0, 5.0])
    pairs = [(u, v) for u in range(n) for v in range(u + 1, n)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True))
    values = [
        Value(u, (*(v for w, v in edges if w == u), *draw(st.sets(st.integers(0, n - 1)))), s, r)
        for u in range(n)
        if (s := draw(few)) + (r := draw(few)) and any(w == u for w, _ in edges)
    ]
    return Problem(
        tuple((Option(draw(few), draw(few), draw(few)),) for _ in range(n)),
        tuple(edges),
        stages,
        tuple(values),
        in_flight=tuple(draw(st.integers(1, 2)) for _ in range(stages)),
        budget_bytes=(draw(st.sampled_from([math.inf, 6.0, 12.0])),) * stages,
    )


@st.composite
def light_problems(draw: st.DrawFn) -> Problem:
    """Plain ones with a part or two that forbid, or nearly, what is quick for plain ones."""
    problem = draw(plain_problems())
    n, stages = problem.n_units, problem.n_stages
    units, order = st.integers(0, n - 1), range(n)
    group = st.lists(units, min_size=2, max_size=2, unique=True).map(tuple)
    one = st.tuples(st.tuples(units, st.none() | st.just(frozenset({0}))))
    kept = st.builds(Kept, st.sampled_from([2.0, 5.0]), one, st.booleans(), st.just(()) | one)
    peaks = st.lists(st.sampled_from([0.0, 0.0, 4.0]), min_size=n, max_size=n)
    parts: dict[str, st.SearchStrategy[Any]] = {
        "pins": some_pins(order, problem.edges, stages),
        "min_units": st.just(1),
        "together": st.tuples(group),
        "kept": st.tuples(kept),
        "sum_weight": st.just(1.0),
        "options": peaks.map(
            lambda each: tuple(
                (replace(option, transient_bytes=peak),)
                for (option,), peak in zip(problem.options, each, strict=True)
            )
        ),
    }
    chosen = draw(st.sets(st.sampled_from(list(parts)), max_size=2))
    return replace(problem, **{name: draw(parts[name]) for name in sorted(chosen)})


def units(n: int, **more: Any) -> Problem:
    defaults: dict[str, Any] = {"n_stages": 2, "edges": tuple((u, u + 1) for u in range(n - 1))}
    options = tuple((Option(1.0, static_bytes=GIB),) for _ in range(n))
    return Problem(options, labels=tuple("abcdefg"[:n]), **(defaults | more))


def chain(n: int, stages: int, *, budget_gib: float, seed: int = 0) -> Problem:
    """Layers with eight ways to run each, a boundary after each, 1F1B with 32 microbatches."""
    random_ = random.Random(seed)
    options, values, kept = [], [], []
    for _ in range(n):
        size = random_.uniform(0.8, 1.2)
        options.append(
            tuple(
                Option(
                    0.03 * size * (1 + 0.04 * k), (1 - 0.1 * k) * size * GIB, 1.2 * GIB, 0.1 * GIB
                )
                for k in range(8)
            )
        )
    for u in range(n - 1):
        values += [Value(u, (u + 1,), 0.001, 0.001), Value(u + 1, (u,), 0.001, 0.001)]
        kept.append(Kept(0.1 * GIB, ((u, None), (u + 1, None))))
    return Problem(
        tuple(options),
        tuple((u, u + 1) for u in range(n - 1)),
        stages,
        tuple(values),
        tuple(kept),
        in_flight=tuple(stages - s for s in range(stages)),
        budget_bytes=(budget_gib * GIB,) * stages,
        max_weight=31.0,
        sum_weight=1.0,
        min_units=1,
    )


def diamonds(count: int, stages: int, seed: int = 0, sizes: int = 30) -> Problem:
    """Blocks of parallel branches: many orders are possible. A tight budget keeps memory in."""
    random_ = random.Random(seed)
    edges, n = [], 1
    for _ in range(count):
        edges += [(n - 1, n + b) for b in range(4)] + [(n + b, n + 4) for b in range(4)]
        n += 5
    return Problem(
        tuple(
            (Option(t := random_.randint(1, sizes), 0, t, 1.0), Option(1.3 * t, 0, 0.5 * t, 1.0))
            for _ in range(n)
        ),
        tuple(edges),
        stages,
        tuple(Value(u, tuple(w for v, w in edges if v == u), 2.0, 2.0) for u in range(n - 1)),
        budget_bytes=(n * sizes / 2 / stages * 0.9,) * stages,
        sum_weight=0.5,
    )


def wide(branches: int, length: int, sizes: int = 30, seed: int = 0, stages: int = 4) -> Problem:
    """Chains beside each other, with little room: no order says anything about most units."""
    random_ = random.Random(seed)
    n = branches * length
    edges = [(u, u + branches) for u in range(n - branches)]
    return Problem(
        tuple(
            (Option(t := random_.randint(1, sizes), 0, t, 1.0), Option(1.3 * t, 0, 0.5 * t, 1.0))
            for _ in range(n)
        ),
        tuple(edges),
        stages,
        tuple(Value(u, (v,), 2.0, 2.0) for u, v in edges),
        budget_bytes=(n * sizes / 2 / stages * 0.9,) * stages,
        sum_weight=0.5,
    )


def misleading() -> Problem:
    """HiGHS 1.16 returned the best contiguous division as optimal, at twice the best seconds."""
    options = (
        Option(0.0),
        Option(1.0),
        Option(1.0, transient_bytes=3.0),
        Option(0.0, static_bytes=8.0),
        Option(0.0, transient_bytes=3.0),
    )
    return Problem(
        tuple((option,) for option in options),
        ((0, 1), (3, 4)),
        3,
        kept=(Kept(0.0, ((0, None),), per_microbatch=False),) * 2,
        pins={1: 0},
        budget_bytes=(10.0, 10.0, 10.0),
        min_units=1,
    )


def stale() -> Problem:
    """HiGHS 1.16 returned a start of 1 s as optimal, and told the 0 s of another solution."""
    return Problem(
        (
            (Option(0.0),),
            (Option(0.0, static_bytes=5.0),),
            (Option(1.0, transient_bytes=3.0), Option(0.0, static_bytes=1.0)),
        ),
        (),
        2,
        kept=(Kept(2.0, ((0, None),), per_microbatch=False),),
        budget_bytes=(10.0, 10.0),
    )


def excess(problem: Problem, ranks_bytes: tuple[float, ...]) -> float:
    return max(0.0, *(u - b for u, b in zip(ranks_bytes, problem.budget_bytes, strict=True)))


def every_solution(problem: Problem) -> list[Solution]:
    found = []
    options = [range(len(each)) for each in problem.options]
    for stage in itertools.product(range(problem.n_stages), repeat=problem.n_units):
        try:
            validate(problem, stage, [0] * problem.n_units)
        except PartitionError:
            continue
        found += [solution_of(problem, stage, k, "all") for k in itertools.product(*options)]
    return found


def fitting(problem: Problem, every: Sequence[Solution]) -> list[Solution]:
    """Those within the budgets, one for each objective, the worst first."""
    some = {each.objective: each for each in every if fits(problem, each)}
    return [some[objective] for objective in sorted(some, reverse=True)]


def optimum(problem: Problem, every: Sequence[Solution]) -> float:
    return min((each.objective for each in fitting(problem, every)), default=math.inf)


def reduced_or_none(problem: Problem) -> Reduced | None:
    """None where pins, groups, order and fewest units contradict each other."""
    try:
        return reduce(problem)
    except PartitionError:
        assert not every_solution(problem)
        return None


def check_against_all(problem: Problem, solver: str = "auto") -> None:
    """The solver's answer is that of trying everything."""
    every = every_solution(problem)
    best = optimum(problem, every)
    try:
        found = solve(problem, solver=solver)
    except MemoryBudgetError as error:
        refused = error
    except PartitionError:
        assert not every
        return
    else:
        refused = None
    if refused is not None:
        assert every
        assert best == math.inf
        assert refused.proven
        least = min(excess(problem, each.ranks_bytes) for each in every)
        assert max(refused.over_bytes) == pytest.approx(least, rel=1e-4)
        assert "too much" in str(refused)
        return
    validate(problem, found.stage, found.option)
    assert fits(problem, found)
    assert found.proven
    assert not found.note
    assert found.objective == pytest.approx(best, rel=1e-5)
    assert found.bound <= found.objective


def check_dynamic(problem: Problem) -> None:
    """The dynamic program alone finds the best, where units have one order."""
    best = optimum(problem, every_solution(problem))
    try:
        found = solve_dynamic(problem)
    except PartitionError:
        assert best == math.inf
        return
    assert found.objective == pytest.approx(best)
    assert found.proven


def check_bounds(problem: Problem, some: Sequence[Solution]) -> None:
    """Windows and the simple bound leave every solution that is as good.

    Args:
        some: solutions that fit.
    """
    for upper in (math.inf, *(each.objective for each in some)):
        limit_s = largest_stage_s(problem, upper)
        limits = windows(problem, limit_s)
        for each in some:
            if each.objective <= upper:
                assert max(each.stages_s) <= limit_s
                assert limits is not None
                assert _inside(each.stage, limits)
    assert all(_simple_bound(problem) <= each.objective * (1 + 1e-9) for each in some)

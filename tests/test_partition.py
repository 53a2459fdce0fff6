"""Partitioning: every solution is legal, fits, and is the best that there is."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pipecompile.compiler.cli import main as cli
from pipecompile.compiler.ir.errors import MemoryBudgetError, OptionError, PartitionError
from pipecompile.compiler.ir.problem import (
    Kept,
    Option,
    Problem,
    Solution,
    Users,
    Value,
    fits,
    solution_of,
    validate,
)
from pipecompile.passes.partition import baselines, dominance, ideals, ilp, presolve
from pipecompile.passes.partition.baselines import solve_dynamic
from pipecompile.passes.partition.presolve import Reduced, reduce
from pipecompile.passes.partition.solve import _inside, _simple_bound, solve
from pipecompile.passes.partition.windows import windows

GIB = 2.0**30
SMALL = st.just(0.0) | st.integers(0, 9).map(float)
SIMPLE = [
    baselines.solve_uniform,
    baselines.solve_parameters,
    baselines.solve_sequential,
    baselines.solve_all_or_nothing,
]


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


def excess(problem: Problem, stages_bytes: tuple[float, ...]) -> float:
    return max(0.0, *(u - b for u, b in zip(stages_bytes, problem.budget_bytes, strict=True)))


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
        least = min(excess(problem, each.stages_bytes) for each in every)
        assert max(refused.over_bytes) == pytest.approx(least, rel=1e-4)
        assert "too much" in str(refused)
        return
    validate(problem, found.stage, found.option)
    assert fits(problem, found)
    assert found.proven
    assert not found.note
    assert found.objective == pytest.approx(best, rel=1e-5)
    assert found.bound <= found.objective


@settings(max_examples=150, deadline=None)
@given(problems() | light_problems())
def test_it_finds_the_best_of_all_assignments(problem: Problem) -> None:
    check_against_all(problem)


@settings(max_examples=60, deadline=None)
@given(problems() | light_problems())
def test_the_integer_program_alone_does(problem: Problem) -> None:
    def nothing(problem: Problem, **_: object) -> Solution:
        raise PartitionError("switched off")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipecompile.passes.partition.solve.solve_dynamic", nothing)
        check_against_all(problem, "highs")


STEPS: dict[str, Callable[[Problem], Reduced]] = {
    "memory": lambda problem: presolve._without_memory(presolve.unreduced(problem)),
    "options": lambda problem: presolve._fewer_options(presolve.unreduced(problem)),
    "groups": lambda problem: presolve.merge(
        presolve.unreduced(problem), presolve._groups(problem)
    ),
    "all of these": reduce,
    "neighbours": lambda problem: dominance.contract(reduce(problem)),
}


def costs(budgets: Sequence[float], solutions: Iterable[Solution]) -> npt.NDArray[np.float64]:
    """[solution, (slowest, all seconds, bytes of every stage that has a budget)]."""
    limited = [s for s, budget in enumerate(budgets) if math.isfinite(budget)]
    rows = {
        (max(each.stages_s), sum(each.stages_s), *(each.stages_bytes[s] for s in limited))
        for each in solutions
    }
    return np.array(sorted(rows)).reshape(-1, 2 + len(limited))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@settings(max_examples=100, deadline=None)
@given(problem=problems() | light_problems() | light_problems())
def test_a_step_of_presolve_keeps_the_optimum(
    step: Callable[[Problem], Reduced], problem: Problem
) -> None:
    """And more: for every solution, one that is no worse in seconds and bytes."""
    if reduced_or_none(problem) is None:
        return
    every, smaller = every_solution(problem), step(problem)
    rest = every_solution(smaller.problem)
    assert optimum(smaller.problem, rest) == pytest.approx(optimum(problem, every))
    lifted = []
    for each in rest:
        stage, option = smaller.lift(each.stage, each.option)
        lifted.append(solution_of(problem, stage, option, "lifted"))
        assert lifted[-1].objective == pytest.approx(each.objective)
        assert fits(problem, lifted[-1]) == fits(smaller.problem, each)
    budgets = smaller.problem.budget_bytes
    left = costs(budgets, lifted)
    assert all(np.any(np.all(left <= row + 1e-9, axis=1)) for row in costs(budgets, every))


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


@pytest.mark.parametrize("solver", ["auto", "highs", "cbc"])
def test_a_start_that_presolve_improves_is_not_the_optimum(solver: str) -> None:
    check_against_all(misleading(), solver)
    assert solve(misleading(), solver=solver).objective == 1.0


@settings(max_examples=150, deadline=None)
@given(problems() | pinned_problems() | pinned_problems())
@example(misleading())
def test_the_integer_program_finds_the_optimum_from_every_start(problem: Problem) -> None:
    if (reduced := reduced_or_none(problem)) is None:
        return
    problem = dominance.contract(reduced).problem
    some = fitting(problem, every_solution(problem))
    for start in (None, *some[:12]):
        upper = start.objective if start else math.inf
        limits = windows(problem, baselines.largest_stage_s(problem, upper))
        if limits is None:
            assert not some
            return
        answer = ilp.minimise_time(
            problem,
            limits,
            (start.stage, start.option) if start else None,
            upper,
            solver="highs",
            time_limit_s=60,
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
    every.sort(key=lambda each: excess(problem, each.stages_bytes), reverse=True)
    for start in (None, *every[:: len(every) // 4 + 1]):
        answer = ilp.minimise_excess(
            problem,
            limits,
            (start.stage, start.option) if start else None,
            solver="highs",
            time_limit_s=60,
        )
        if answer.stage is None or answer.option is None:
            assert answer.bound == math.inf
            assert not every
            return
        found = solution_of(problem, answer.stage, answer.option, "highs")
        least = pytest.approx(excess(problem, every[-1].stages_bytes), rel=2e-3, abs=1e-4)
        assert excess(problem, found.stages_bytes) == least
        assert answer.bound == least


@settings(max_examples=60, deadline=None)
@given(problems() | problems(chain=True))
def test_the_dynamic_program_finds_the_best_division_into_runs(problem: Problem) -> None:
    if (reduced := reduced_or_none(problem)) is None:
        return
    problem = reduced.problem
    every = every_solution(problem)
    groups = baselines.in_order(problem)
    runs = [
        each
        for each in every
        if all(each.stage[a] <= each.stage[b] for (a, *_), (b, *_) in itertools.pairwise(groups))
    ]
    try:
        found = solve_dynamic(problem)
    except PartitionError:
        assert optimum(problem, runs) == math.inf
        return
    assert fits(problem, found)
    assert found.objective == pytest.approx(optimum(problem, runs))
    if found.proven:
        assert found.objective == pytest.approx(optimum(problem, every))


@settings(max_examples=40, deadline=None)
@given(problems(chain=True))
def test_the_dynamic_program_is_exact_on_chains(problem: Problem) -> None:
    best = optimum(problem, every_solution(problem))
    try:
        found = solve_dynamic(problem)
    except PartitionError:
        assert best == math.inf
        return
    assert found.objective == pytest.approx(best)
    assert found.proven


@settings(max_examples=40, deadline=None)
@given(problems(chain=True))
def test_simple_strategies_are_legal_and_never_better(problem: Problem) -> None:
    problem = replace(problem, pins={}, min_units=0)
    free = solve(replace(problem, budget_bytes=()))
    for strategy in SIMPLE:
        found = strategy(problem)
        validate(problem, found.stage, found.option)
        assert found.objective >= free.objective * (1 - 1e-9)


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
        answer = ideals.minimise_time(reduced.problem, upper, deadline=math.inf)
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
    answer = ideals.minimise_time(problem, 21.5, deadline=math.inf)
    assert answer is not None
    assert answer.stage is None
    assert answer.bound == 21.5


def test_constants_and_reshapes_are_merged() -> None:
    """0: matmul, 1: reshape of it, 2: matmul that reads that and a constant, 3."""
    options = tuple((Option(seconds),) for seconds in (3.0, 0.0, 4.0, 0.0))
    values = tuple(Value(u, (v,), 1.0, 1.0) for u, v in ((0, 1), (1, 2), (3, 2)))
    problem = Problem(options, ((0, 1), (1, 2), (3, 2)), 2, values)
    smaller = dominance.contract(reduce(problem))
    assert sorted(map(sorted, smaller.members)) in ([[0], [1, 2, 3]], [[0, 1], [2, 3]])
    assert solve(problem).objective == 5.0


def operator_graph(blocks: int, stages: int) -> Problem:
    """Blocks of four branches, with a constant and a reshape at every operator."""
    random_ = random.Random(3)
    seconds, edges = [0.1], []

    def add(s: float, *sources: int) -> int:
        edges.extend((u, len(seconds)) for u in sources)
        seconds.append(s)
        return len(seconds) - 1

    last = 0
    for _ in range(blocks):
        ends = []
        for branch in range(4):
            end = last
            for _ in range(1 + branch % 3):
                end = add(random_.uniform(0.1, 1.0), add(0.0, end), add(0.0))
            ends.append(end)
        last = add(0.1, *ends)
    readers = [tuple(v for u, v in edges if u == w) for w in range(len(seconds))]
    values = tuple(Value(u, each, 0.2, 0.2) for u, each in enumerate(readers) if each)
    return Problem(tuple((Option(s),) for s in seconds), tuple(edges), stages, values)


def test_operator_graphs_of_hundreds_of_nodes_are_proven() -> None:
    problem = operator_graph(12, 6)
    assert problem.n_units > 250
    found = solve(problem)
    assert found.proven
    assert found.objective < solve(problem, solver="dynamic").objective * (1 + 1e-9)


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


def test_chains_of_many_layers_are_solved_in_seconds() -> None:
    problem = chain(80, 8, budget_gib=45)
    found = solve(problem)
    assert found.proven
    assert fits(problem, found)
    assert found.seconds < 20
    two_steps = baselines.solve_sequential(problem)
    assert not fits(problem, two_steps) or found.objective <= two_steps.objective


def test_the_integer_program_agrees_with_the_dynamic_one() -> None:
    problem = chain(8, 3, budget_gib=16)
    limits = windows(problem, math.inf)
    assert limits is not None
    answer = ilp.minimise_time(problem, limits, None, math.inf, solver="highs", time_limit_s=60)
    assert answer.stage is not None
    assert answer.option is not None
    found = solution_of(problem, answer.stage, answer.option, "highs")
    best = solve_dynamic(problem)
    assert best.proven
    assert found.objective == pytest.approx(best.objective, rel=1e-5)
    assert answer.bound <= best.objective * (1 + 1e-6)


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


def test_a_time_limit_leaves_a_solution_and_a_bound() -> None:
    problem = diamonds(16, 8, sizes=1000)
    found = solve(problem, time_limit_s=1.0)
    validate(problem, found.stage, found.option)
    assert fits(problem, found)
    assert 0 < found.bound < found.objective
    assert not found.proven
    assert "time limit of 1 s reached, gap" in found.note


def test_units_of_a_group_and_pinned_ones_are_where_they_have_to_be() -> None:
    problem = replace(diamonds(3, 3), together=((2, 9),), pins={1: 1}, budget_bytes=())
    found = solve(problem)
    assert found.proven
    assert found.stage[2] == found.stage[9]
    assert found.stage[1] == 1


def units(n: int, **more: Any) -> Problem:
    defaults: dict[str, Any] = {"n_stages": 2, "edges": tuple((u, u + 1) for u in range(n - 1))}
    options = tuple((Option(1.0, static_bytes=GIB),) for _ in range(n))
    return Problem(options, labels=tuple("abcdefg"[:n]), **(defaults | more))


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (units(3, pins={0: 1, 2: 0}), "a is pinned to stage 1 and c, which must not come before"),
        (units(3, pins={0: 0, 2: 1}, together=((0, 2),)), "a is pinned to stage 0 and c to stage"),
        (units(3, pins={1: 2}), "b is pinned to stage 2, but the stages are 0 to 1"),
        (
            units(3, n_stages=4, min_units=1),
            r"n_stages=4, but the model has only 3 units .*: use n_stages=3 or fewer",
        ),
        (units(3, min_units=1, together=((0, 2),)), "leaves only 1 groups of units"),
        (units(3, min_units=1, pins={0: 1}), "no division into 2 stages has at least 1 units"),
    ],
)
def test_contradictions_are_named(problem: Problem, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        solve(problem)


def test_what_does_not_fit_says_by_how_much() -> None:
    problem = units(5, budget_bytes=(1.75 * GIB, 2.5 * GIB))
    with pytest.raises(
        MemoryBudgetError,
        match=r"stage 1 needs 3.00 GiB of 2.50 GiB, .*too much",
    ) as caught:
        solve(problem)
    assert caught.value.proven
    assert max(caught.value.over_bytes) == pytest.approx(0.5 * GIB)
    assert caught.value.nearest.stage == (0, 0, 1, 1, 1)


def test_a_budget_of_nothing_is_too_small_and_no_contradiction() -> None:
    problem = replace(units(3, budget_bytes=(0.0, 0.0)), edges=((0, 1),))
    with pytest.raises(MemoryBudgetError, match=r"needs 2.00 GiB of 0.00 GiB") as caught:
        solve(problem)
    assert caught.value.proven
    assert max(caught.value.over_bytes) == pytest.approx(2 * GIB)


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(OptionError, match="use one of auto, highs, cbc, dynamic"):
        solve(units(3), solver="simplex")


def unavailable(*_: object) -> bool:
    return False


def crash(*_: object) -> None:
    raise RuntimeError("out of ideas")


def idle(*_: object) -> None:
    """As HiGHS is that runs with other threads elsewhere in the process."""


def small_diamonds() -> Problem:
    return replace(diamonds(2, 3, sizes=9), sum_weight=0.25)


def test_cbc_stands_in_for_a_missing_highs(monkeypatch: pytest.MonkeyPatch) -> None:
    best = solve(small_diamonds(), solver="highs")
    monkeypatch.setattr(ilp._WarmHighs, "available", unavailable)
    found = solve(small_diamonds())
    assert found.proven
    assert found.objective == pytest.approx(best.objective)
    assert "highs is not installed" in found.note


@pytest.mark.parametrize(("call", "why"), [(crash, "out of ideas"), (idle, "Not Set")])
def test_a_solver_that_crashes_is_named_and_replaced(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., None], why: str
) -> None:
    best = solve(small_diamonds(), solver="highs")
    monkeypatch.setattr(ilp._WarmHighs, "callSolver", call)
    found = solve(small_diamonds())
    assert found.proven
    assert found.objective == pytest.approx(best.objective)
    assert f"highs failed: {why}" in found.note


class StuckHighs(ilp._WarmHighs):
    """Calls its start optimal, although its bound is lower."""

    def callSolver(self, lp: Any) -> None:  # noqa: N802
        self.start = {v.index: v.varValue for v in lp.variables() if v.varValue is not None}
        for column, value in self.start.items():
            lp.solverModel.changeColBounds(column, value, value)
        lp.solverModel.run()

    def findSolutionValues(self, lp: Any) -> tuple[int, int]:  # noqa: N802
        status = super().findSolutionValues(lp)
        self.bound *= 0.9 if self.start else 1.0
        return status


def test_a_solver_that_calls_its_start_optimal_is_asked_again_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    best = solve(small_diamonds(), solver="highs")
    assert best.solver == "highs"
    monkeypatch.setattr(ilp, "_WarmHighs", StuckHighs)
    found = solve(small_diamonds(), solver="highs")
    assert found.proven
    assert found.objective == pytest.approx(best.objective)


def test_without_any_solver_the_best_contiguous_division_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ilp._WarmHighs, "available", unavailable)
    monkeypatch.setattr(ilp.pulp.PULP_CBC_CMD, "available", unavailable)
    found = solve(small_diamonds())
    assert fits(small_diamonds(), found)
    assert not found.proven
    assert "highs is not installed, cbc is not installed, best contiguous division" in found.note


def device_graph() -> dict[str, Any]:
    """Two layers and their gradients; a layer and its gradient are of one class."""
    nodes = [
        {"id": 10 * i, "fpgaLatency": t, "size": 4.0, "colorClass": c, "isBackwardNode": b}
        for i, (t, c, b) in enumerate([(3.0, 1, 0), (2.0, 2, 0), (4.0, 2, 1), (5.0, 1, 1)])
    ]
    edges = [
        {"sourceId": 10 * u, "destId": 10 * v, "cost": cost}
        for u, v, cost in [(0, 1, 0.5), (1, 2, 0.0), (2, 3, 0.25)]
    ]
    return {"maxFPGAs": 2, "maxSizePerFPGA": 100.0, "nodes": nodes, "edges": edges}


def layer_plan() -> dict[str, Any]:
    ways = [("vanilla", 1.0, 2.0 * GIB), ("activation recomp", 1.5, 0.5 * GIB)]
    nodes = [
        {
            "id": i,
            "TMPCs": {
                "1": [
                    {"id": name, "timePerSample": s, "memoryUsageA": a, "memoryUsageB": GIB}
                    for name, s, a in ways
                ]
            },
        }
        for i in range(4)
    ]
    edges = [{"sourceId": i, "destId": i + 1, "communicationCost": 2.5 * GIB} for i in range(3)]
    return {"maxDevices": 2, "nodes": nodes, "edges": edges}


def solved(tmp_path: Path, data: object, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    (tmp_path / "graph.json").write_text(json.dumps(data))
    assert cli.main(["solve", str(tmp_path), "--json", *more]) == 0
    [outcome] = json.loads(capsys.readouterr().out)
    return outcome


def test_solve_reads_device_graphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = solved(tmp_path, device_graph(), capsys)
    assert outcome["objective"] == pytest.approx(8.0 + 0.5 + 0.25)
    assert outcome["proven"]
    assert outcome["stage"] == [0, 1, 1, 0]
    assert solved(tmp_path, device_graph(), capsys, "--stages", "1")["objective"] == 14.0


def test_solve_reads_layer_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = 2 * 2.5 / 25
    outcome = solved(tmp_path, layer_plan(), capsys, "--stages", "2", "--memory", "10")
    assert outcome["objective"] == pytest.approx(2.0 + cut)
    outcome = solved(tmp_path, layer_plan(), capsys, "--stages", "2", "--memory", "7")
    assert outcome["objective"] == pytest.approx(2.5 + cut)  # 2 · (2 + 0.5) + 2 GiB on stage 0
    outcome = solved(tmp_path, layer_plan(), capsys, "--stages", "2", "--memory", "2")
    assert outcome["objective"] is None
    assert "too much" in outcome["note"]


def test_solve_prints_a_row_per_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in (("one", device_graph()), ("two", layer_plan())):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    assert cli.main(["solve", str(tmp_path), "--stages", "2", "--time-limit", "5"]) == 0
    head, one, two = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[:4] == ["graph", "nodes", "k", "objective"]
    assert one[:4] == ["one", "4", "2", "8.75"]
    assert two[:4] == ["two", "4", "2", "2.7"] or two[:3] == ["two", "4", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('{"nodes": []}', "is neither a device graph (with maxFPGAs) nor a layer plan"),
        ('{"maxFPGAs": 2, "nodes": [{"id": 1}], "edges": []}', "is missing"),
        ("[]", "is neither"),
    ],
)
def test_solve_refuses_other_files(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "graph.json").write_text(text)
    assert cli.main(["solve", str(tmp_path / "graph.json")]) == 2
    assert message in capsys.readouterr().err

"""Every solution is legal, fits, and is the best that there is; what cannot be says why."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.ir.errors import MemoryBudgetError, OptionError, PartitionError
from pipecompile.compiler.ir.problem import Option, Problem, Value, fits, validate
from pipecompile.passes.partition import baselines
from pipecompile.passes.partition.sharing import apart
from pipecompile.passes.partition.solve import solve
from support.problems import (
    GIB,
    chain,
    check_against_all,
    diamonds,
    light_problems,
    misleading,
    problems,
    shared_problems,
    units,
    wide,
)


@settings(max_examples=40, deadline=None)
@given(problems() | light_problems())
def test_it_finds_the_best_of_all_assignments(problem: Problem) -> None:
    check_against_all(problem)


@settings(max_examples=15, deadline=None)
@given(shared_problems())
def test_it_finds_the_best_where_ranks_hold_several_stages(problem: Problem) -> None:
    check_against_all(problem)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(problems() | light_problems() | shared_problems())
def test_it_finds_the_best_of_many_problems(problem: Problem) -> None:
    check_against_all(problem)


@settings(max_examples=100, deadline=None)
@given(problems() | light_problems(), st.data())
def test_ranks_of_one_stage_may_be_numbered_in_any_order(
    problem: Problem, data: st.DataObject
) -> None:
    homes = tuple(data.draw(st.permutations(range(problem.n_stages))))
    check_against_all(replace(problem, homes=homes, together_in_flight=()))


@settings(max_examples=100, deadline=None)
@given(shared_problems(), st.data())
def test_what_fits_stage_by_stage_fits_on_shared_ranks(
    problem: Problem, data: st.DataObject
) -> None:
    narrow = apart(problem)
    stage = [data.draw(st.integers(0, problem.n_stages - 1)) for _ in range(problem.n_units)]
    option = [data.draw(st.integers(0, len(each) - 1)) for each in problem.options]
    held = narrow.ranks_bytes(stage, option)
    if all(used <= room for used, room in zip(held, narrow.budget_bytes, strict=True)):
        rooms = zip(problem.ranks_bytes(stage, option), problem.budget_bytes, strict=True)
        assert all(used <= room * (1 + 1e-12) + 1e-9 for used, room in rooms)


@pytest.mark.parametrize("solver", ["auto", "highs", "cbc"])
def test_a_start_that_presolve_improves_is_not_the_optimum(solver: str) -> None:
    check_against_all(misleading(), solver)
    assert solve(misleading(), solver=solver).objective == 1.0


def test_chains_of_many_layers_are_solved_in_seconds() -> None:
    problem = chain(80, 8, budget_gib=45)
    found = solve(problem)
    assert found.proven
    assert fits(problem, found)
    assert found.seconds < 20
    two_steps = baselines.solve_sequential(problem)
    assert not fits(problem, two_steps) or found.objective <= two_steps.objective


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


def test_a_time_limit_leaves_a_solution_and_a_bound() -> None:
    problem = wide(6, 6, sizes=1000)
    found = solve(problem, time_limit_s=0.5)
    validate(problem, found.stage, found.option)
    assert fits(problem, found)
    assert 0 < found.bound < found.objective
    assert not found.proven
    assert "time limit of 0.5 s reached, gap" in found.note


def test_units_of_a_group_and_pinned_ones_are_where_they_have_to_be() -> None:
    problem = replace(diamonds(3, 3), together=((2, 9),), pins={1: 1}, budget_bytes=())
    found = solve(problem)
    assert found.proven
    assert found.stage[2] == found.stage[9]
    assert found.stage[1] == 1


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
    with pytest.raises(MemoryBudgetError, match=r"needs 2.00 GiB of 0 bytes") as caught:
        solve(problem)
    assert caught.value.proven
    assert max(caught.value.over_bytes) == pytest.approx(2 * GIB)


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(OptionError, match="use one of auto, highs, cbc, dynamic"):
        solve(units(3), solver="simplex")

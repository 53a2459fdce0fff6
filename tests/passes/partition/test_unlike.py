"""Devices of several kinds and links that are not alike: what every solver says of them is true."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.ir.errors import PartitionError
from pipecompile.compiler.ir.problem import (
    Link,
    Option,
    Problem,
    Solution,
    Value,
    fits,
    solution_of,
)
from pipecompile.passes.integer.work import Work
from pipecompile.passes.partition import dominance, ideals, lattice
from pipecompile.passes.partition.baselines import solve_dynamic
from pipecompile.passes.partition.solve import solve
from support.problems import (
    chain,
    check_against_all,
    check_bounds,
    check_dynamic,
    every_solution,
    fitting,
    light_problems,
    optimum,
    plain_problems,
    problems,
    reduced_or_none,
    shared_problems,
    unlike_problems,
)

DRAWN = unlike_problems(problems() | light_problems())


def by_hand(problem: Problem, stage: tuple[int, ...], option: tuple[int, ...]) -> list[float]:
    """Seconds of every stage, added up message by message."""
    homes = problem.homes
    seconds = [0.0] * problem.n_stages
    for unit, s in enumerate(stage):
        seconds[s] += problem.options[unit][option[unit]].by_kind[problem.kinds[homes[s]]]
    for src, dst in itertools.permutations(range(problem.n_stages), 2):
        if homes[src] == homes[dst]:
            continue
        link = problem.links[homes[src]][homes[dst]] if problem.links else Link()
        read = [
            v
            for v in problem.values
            if stage[v.source] == src and dst in {stage[r] for r in v.readers}
        ]
        seconds[dst] += sum(v.receive_s for v in read) * link.slower
        seconds[dst] += link.latency_s * any(v.receive_s + v.send_s for v in read)
    for value in problem.values:
        src = stage[value.source]
        away = {homes[stage[r]] for r in value.readers} - {homes[src]}
        slower = [problem.links[homes[src]][r].slower if problem.links else 1.0 for r in away]
        seconds[src] += value.send_s * max(slower, default=0.0)
    return seconds


@settings(max_examples=60, deadline=None)
@given(unlike_problems(problems() | shared_problems()), st.data())
def test_what_a_division_takes_is_what_its_devices_and_links_take(
    problem: Problem, data: st.DataObject
) -> None:
    stage = tuple(data.draw(st.integers(0, problem.n_stages - 1)) for _ in problem.options)
    option = tuple(data.draw(st.integers(0, len(each) - 1)) for each in problem.options)
    assert problem.stages_s(stage, option) == pytest.approx(by_hand(problem, stage, option))


@settings(max_examples=60, deadline=None)
@given(DRAWN | unlike_problems(shared_problems()))
def test_the_solver_finds_the_best_of_all_assignments(problem: Problem) -> None:
    check_against_all(problem)


@settings(max_examples=60, deadline=None)
@given(DRAWN)
def test_the_integer_program_alone_finds_it(problem: Problem) -> None:
    def nothing(problem: Problem, **_: object) -> Solution:
        raise PartitionError("switched off")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipecompile.passes.partition.solve.solve_dynamic", nothing)
        check_against_all(problem, "highs")


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(unlike_problems(problems() | light_problems() | plain_problems() | shared_problems()))
def test_the_solver_finds_the_best_of_many(problem: Problem) -> None:
    check_against_all(problem)


@settings(max_examples=60, deadline=None)
@given(DRAWN)
def test_presolve_windows_and_the_simple_bound_leave_the_best(problem: Problem) -> None:
    if (reduced := reduced_or_none(problem)) is None:
        return
    small = dominance.contract(reduced).problem
    some = fitting(small, every_solution(small))
    assert optimum(small, some) == pytest.approx(optimum(problem, every_solution(problem)))
    check_bounds(small, some)


@settings(max_examples=60, deadline=None)
@given(unlike_problems(problems(chain=True), links=False))
def test_the_dynamic_program_is_exact_on_chains(problem: Problem) -> None:
    check_dynamic(problem)


@settings(max_examples=60, deadline=None)
@given(unlike_problems(problems(chain=True)))
def test_the_dynamic_program_proves_nothing_that_links_make_false(problem: Problem) -> None:
    best = optimum(problem, every_solution(problem))
    try:
        found = solve_dynamic(problem)
    except PartitionError:
        return
    assert found.bound <= best * (1 + 1e-9)
    assert found.objective >= best * (1 - 1e-9)
    assert not found.proven or found.objective == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(DRAWN)
def test_the_lattice_alone_is_exact_without_links_and_a_bound_with_them(problem: Problem) -> None:
    if (reduced := reduced_or_none(problem)) is None:
        return
    small = reduced.problem
    if not lattice.applies(small):
        return
    best = optimum(small, every_solution(small))
    answer = lattice.minimise(small, math.inf, work=Work(60))
    assert answer is not None
    if small.links:
        assert answer.bound <= best * (1 + 2e-6)
    else:
        assert answer.bound == pytest.approx(best, rel=2e-6)
    if answer.stage is not None and answer.option is not None:
        found = solution_of(small, answer.stage, answer.option, "lattice")
        assert fits(small, found)
        assert small.links or found.objective == pytest.approx(best, rel=2e-6)


@settings(max_examples=30, deadline=None)
@given(plain_problems(), st.data())
def test_what_takes_ranks_for_alike_steps_aside(problem: Problem, data: st.DataObject) -> None:
    """Or a unit would be merged with a neighbour that is on a faster device."""
    stages = problem.n_stages
    links = ((Link(2.0),) * stages,) * stages
    assert dominance.applies(problem)
    assert not dominance.applies(replace(problem, links=links))
    assert not ideals.applies(replace(problem, links=links))
    if stages > 1:
        kinds = (0,) * (stages - 1) + (1,)
        assert not dominance.applies(replace(problem, kinds=kinds))


def machines(problem: Problem, size: int, slower: float) -> Problem:
    """So many ranks on each, in order, with links between them that are so much slower."""
    ranks = range(problem.n_ranks)
    row = tuple(
        tuple(Link(slower if a // size != b // size else 1.0, 1e-5) for b in ranks) for a in ranks
    )
    return replace(problem, links=row)


def test_neighbours_links_are_proven_by_the_dynamic_program_on_many_layers() -> None:
    """Values go from a stage to the next, so that the bounds of links are the truth."""
    problem = machines(chain(30, 4, budget_gib=45), 2, 20.0)
    found = solve(problem)
    assert (found.proven, found.solver, found.note) == (True, "dynamic", "")
    assert found.objective > solve(replace(problem, links=())).objective


@settings(max_examples=40, deadline=None)
@given(unlike_problems(problems(chain=True)).filter(lambda problem: problem.edges))
def test_links_of_neighbours_alone_are_exact_on_chains(problem: Problem) -> None:
    """Each unit gives something to the next and back; stages have a unit at least."""
    values = tuple(
        Value(a, (b,), receive_s=2.0) for u, v in problem.edges for a, b in ((u, v), (v, u))
    )
    check_dynamic(replace(problem, values=values, min_units=1, pins={}))


def test_the_cut_between_machines_goes_where_little_crosses() -> None:
    """Twelve equal layers; what crosses after the fifth is a tenth of what crosses elsewhere."""
    sizes = [0.1 if u == 4 else 1.0 for u in range(11)]
    problem = Problem(
        ((Option(10.0),),) * 12,
        tuple((u, u + 1) for u in range(11)),
        4,
        tuple(Value(u, (u + 1,), receive_s=size) for u, size in enumerate(sizes)),
        min_units=1,
        sum_weight=0.1,
    )
    assert solve(problem).stage.count(0) == 3
    far = solve(machines(problem, 2, 30.0))
    assert far.proven
    assert far.stage.index(2) == 5


def test_a_slow_device_gets_fewer_layers_and_what_it_is_good_at() -> None:
    """Kind 1 multiplies at a third of the rate, and looks up as fast."""
    lookup, layer = Option(6.0, by_kind=(6.0, 6.0)), Option(4.0, by_kind=(4.0, 12.0))
    problem = Problem(
        ((lookup,), *(((layer,),) * 8)),
        tuple((u, u + 1) for u in range(8)),
        2,
        min_units=1,
    )
    fast_last = solve(replace(problem, kinds=(1, 0)))
    assert fast_last.stage == (0, 0, *(1,) * 7)
    assert fast_last.objective == 28.0
    fast_first = solve(replace(problem, kinds=(0, 1)))
    assert fast_first.stage == (*(0,) * 7, 1, 1)
    assert fast_first.objective == 30.0
    assert solve(replace(problem, kinds=(1, 1))).objective == 54.0


@pytest.mark.parametrize("size", [1, 2])
def test_budgets_are_of_each_rank(size: int) -> None:
    problem = Problem(
        ((Option(1.0, static_bytes=size, by_kind=(1.0, 1.0)),),) * 6,
        tuple((u, u + 1) for u in range(5)),
        2,
        budget_bytes=(4.0 * size, 2.0 * size),
        kinds=(0, 1),
    )
    found = solve(problem)
    assert found.stage == (0, 0, 0, 0, 1, 1)
    assert found.proven

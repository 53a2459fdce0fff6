"""Partitioning: every solution is legal, fits, and is the best that there is."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
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
from pipecompile.passes.partition import baselines, dominance, ideals, ilp
from pipecompile.passes.partition.baselines import solve_dynamic
from pipecompile.passes.partition.presolve import reduce
from pipecompile.passes.partition.solve import solve
from pipecompile.passes.partition.windows import windows

GIB = 2.0**30
SIMPLE = [
    baselines.solve_uniform,
    baselines.solve_parameters,
    baselines.solve_sequential,
    baselines.solve_all_or_nothing,
]


@st.composite
def problems(draw: st.DrawFn, *, chain: bool = False) -> Problem:
    """Small ones: every part of a problem is drawn."""
    n, stages = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    small = st.integers(0, 9).map(float)
    units = st.integers(0, n - 1)
    one = st.builds(Option, small, small, small, st.sampled_from([0.0, 3.0, 5.0]))
    options = tuple(tuple(draw(st.lists(one, min_size=1, max_size=3))) for _ in range(n))
    pairs = [(u, v) for u in range(n) for v in range(u + 1, n)]
    order = [(u, u + 1) for u in range(n - 1)] if chain else draw(st.lists(st.sampled_from(pairs)))
    readers = st.lists(units, min_size=1, max_size=3, unique=True).map(tuple)

    def users(least: int) -> Users:
        found = draw(st.lists(units, min_size=least, max_size=2))
        which = {u: st.frozensets(st.integers(0, len(options[u]) - 1), min_size=1) for u in found}
        return tuple((u, draw(st.none() | which[u])) for u in found)

    kept = [Kept(draw(small), users(1), draw(st.booleans()), users(0)) for _ in range(2)]
    group = draw(st.lists(units, max_size=2, unique=True).map(tuple))
    return Problem(
        options,
        tuple(order),
        stages,
        tuple(draw(st.lists(st.builds(Value, units, readers, small, small), max_size=3))),
        tuple(kept),
        together=(group,) if len(group) > 1 and not chain else (),
        pins=draw(st.dictionaries(units, st.integers(0, stages - 1), max_size=1)),
        in_flight=tuple(draw(st.integers(1, 3)) for _ in range(stages)),
        budget_bytes=tuple(draw(st.integers(10, 60).map(float)) for _ in range(stages)),
        max_weight=draw(st.sampled_from([1.0, 3.0])),
        sum_weight=draw(st.sampled_from([0.0, 1.0])),
        min_units=draw(st.integers(0, 1)),
    )


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


def check_against_all(problem: Problem, solver: str = "auto") -> None:
    """The solver's answer is that of trying everything."""
    every = every_solution(problem)
    fitting = [each.objective for each in every if fits(problem, each)]
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
        assert not fitting
        assert refused.proven
        least = min(excess(problem, each.stages_bytes) for each in every)
        assert max(refused.over_bytes) == pytest.approx(least, rel=1e-4)
        assert "too much" in str(refused)
        return
    validate(problem, found.stage, found.option)
    assert fits(problem, found)
    assert found.proven
    assert found.objective == pytest.approx(min(fitting), rel=1e-5)
    assert found.bound <= found.objective


@settings(max_examples=60, deadline=None)
@given(problems())
def test_it_finds_the_best_of_all_assignments(problem: Problem) -> None:
    check_against_all(problem)


@settings(max_examples=25, deadline=None)
@given(problems())
def test_the_integer_program_alone_does(problem: Problem) -> None:
    def nothing(problem: Problem, **_: object) -> Solution:
        raise PartitionError("switched off")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipecompile.passes.partition.solve.solve_dynamic", nothing)
        check_against_all(problem, "highs")


@settings(max_examples=40, deadline=None)
@given(problems(chain=True))
def test_the_dynamic_program_is_exact_on_chains(problem: Problem) -> None:
    fitting = [each.objective for each in every_solution(problem) if fits(problem, each)]
    try:
        found = solve_dynamic(problem)
    except PartitionError:
        assert not fitting
        return
    assert found.objective == pytest.approx(min(fitting))
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


@settings(max_examples=100, deadline=None)
@given(plain_problems())
def test_free_units_and_ideals_keep_the_optimum(problem: Problem) -> None:
    check_against_all(problem)


@settings(max_examples=100, deadline=None)
@given(plain_problems())
def test_the_ideals_alone_find_the_best_of_all_assignments(problem: Problem) -> None:
    fitting = [each.objective for each in every_solution(problem) if fits(problem, each)]
    reduced = reduce(problem)
    assert ideals.applies(reduced.problem)
    answer = ideals.minimise_time(reduced.problem, math.inf, deadline=math.inf)
    assert answer is not None
    assert answer.bound == pytest.approx(min(fitting, default=math.inf))
    if answer.stage is not None:
        option = (0,) * reduced.problem.n_units
        found = solution_of(problem, *reduced.lift(answer.stage, option), "ideals")
        assert fits(problem, found)
        assert found.objective == pytest.approx(answer.bound)


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


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(OptionError, match="use one of auto, highs, cbc, dynamic"):
        solve(units(3), solver="simplex")


def unavailable(*_: object) -> bool:
    return False


def crash(*_: object) -> None:
    raise RuntimeError("out of ideas")


def small_diamonds() -> Problem:
    return replace(diamonds(2, 3, sizes=9), sum_weight=0.25)


def test_cbc_stands_in_for_a_missing_highs(monkeypatch: pytest.MonkeyPatch) -> None:
    best = solve(small_diamonds(), solver="highs")
    monkeypatch.setattr(ilp._WarmHighs, "available", unavailable)
    found = solve(small_diamonds())
    assert found.proven
    assert found.objective == pytest.approx(best.objective)
    assert "highs is not installed" in found.note


def test_a_solver_that_crashes_is_named_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    best = solve(small_diamonds(), solver="highs")
    monkeypatch.setattr(ilp._WarmHighs, "callSolver", crash)
    found = solve(small_diamonds())
    assert found.objective == pytest.approx(best.objective)
    assert "highs failed: out of ideas" in found.note


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

"""The local search on the simulated step: never worse, legal, and better where the formula errs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.calibration.tables import table_of
from pipecompile.compiler.capture import batch as batches
from pipecompile.compiler.capture.capture import capture_training
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.costs.cost import node_cost
from pipecompile.compiler.costs.hardware import H100
from pipecompile.compiler.costs.topology import Numbering, Topology
from pipecompile.compiler.ir.actions import Kind
from pipecompile.compiler.ir.errors import PartitionError
from pipecompile.compiler.ir.locality import locality_of
from pipecompile.compiler.ir.problem import Option, Problem, Value, fits, solution_of, validate
from pipecompile.compiler.memory.rank_memory import stage_holds
from pipecompile.compiler.planning.refine import LEAST_GAIN, StepModel, refine, smoothed
from pipecompile.compiler.units.pricing import UnitPrices
from pipecompile.compiler.units.stash import bodies_of
from pipecompile.compiler.units.units import units_of
from pipecompile.compiler.units.weights import WeightWork, weight_works
from pipecompile.passes.graph.placement import place
from pipecompile.passes.partition.solve import solve
from pipecompile.passes.programs.lower import lower
from pipecompile.passes.schedule.load import far_of
from pipecompile.passes.schedule.registry import SCHEDULES
from support import models
from support.matrix import quickly


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
    work = [WeightWork(0.5, 1)] * len(prices)
    return StepModel(problem, kind, shape, prices, work, H100.with_link(1.0, 0.0))


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


def test_stages_become_alike_where_the_slowest_leaves_it_open() -> None:
    model = model_of([1.0] * 8, [0.0] * 7, 4, 16)
    uneven = solution_of(model.problem, (0, 1, 1, 1, 1, 2, 2, 3), (0,) * 8, "")
    found = smoothed(model.problem, uneven)
    assert model.problem.stages_s(found.stage, found.option) == (6.0,) * 4
    validate(model.problem, found.stage, found.option)


@settings(max_examples=40, deadline=None)
@given(SECONDS, st.integers(2, 4), st.sampled_from([math.inf, 30.0, 12.0]), st.data())
def test_smoothing_keeps_the_slowest_stage_and_what_is_legal(
    seconds: list[float], ranks: int, budget: float, data: st.DataObject
) -> None:
    model = model_of(seconds, [0.0] * (len(seconds) - 1), ranks, 8, budget=budget)
    cuts = data.draw(
        st.lists(st.integers(0, ranks - 1), min_size=len(seconds), max_size=len(seconds))
    )
    try:
        given_ = solution_of(model.problem, sorted(cuts), (0,) * len(seconds), "")
    except PartitionError:
        return
    found = smoothed(model.problem, given_)
    validate(model.problem, found.stage, found.option)
    assert found is given_ or fits(model.problem, found)
    slowest = [max(model.problem.stages_s(x.stage, x.option)) for x in (given_, found)]
    assert slowest[1] <= slowest[0] * (1 + 1e-9) or math.isfinite(budget)


@pytest.mark.parametrize("name", quickly(["gpt2"], ["llama", "gpt2"]))
def test_what_units_say_of_w_is_that_of_their_programs(name: str) -> None:
    """What W reads and how long it takes, of every stage that sends gradients on; nearly, as units
    of a stage share what they read."""
    device = torch.device("cpu")
    model = models.MODELS[name][0]()
    skeleton, spec = skeleton_of(model, device), batches.flatten(models.tokens(2))[1]
    graph = capture_training(skeleton, spec, None, device).graph
    locality = locality_of(graph)
    units = units_of(graph, locality, H100)
    bodies, places = bodies_of(graph, locality, units)
    home = [3 * body.unit.index // len(units) for body in bodies]
    placed = place(graph, locality, {n: home[b.unit.index] for b in bodies for n in b.forward})
    program = lower(graph, locality, placed.stage, 3, split_backward=True)
    work = weight_works(bodies, places, H100)
    for s in (1, 2):
        mine = [i for i in range(len(units)) if home[i] == s]
        carried = sum(work[i].carry_bytes for i in mine)
        assert carried == pytest.approx(stage_holds(program, s)[Kind.B], rel=0.15)
        weight = [n for n in placed.stage if n.name in program.weight_nodes]
        took = sum(node_cost(n, H100).seconds for n in weight if placed.stage[n] == s)
        said = sum(work[i].part * units[i].backward.seconds for i in mine)
        assert said == pytest.approx(took, rel=0.15)


def test_a_cut_between_machines_moves_to_where_little_crosses() -> None:
    """Four ranks on two machines: only the cut in the middle leaves one."""
    near = model_of([2.0] * 8, [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], 4, 16, link_s=0.01)
    even = solve(near.problem)
    assert even.stage == (0, 0, 1, 1, 2, 2, 3, 3)
    assert refine(near, even)[0].stage == even.stage
    device = replace(near.device, topology=Topology(2, bytes_per_s=0.001, latency_s=0.0))
    far = replace(near, device=device.with_ranks(Numbering(4, 1)))
    found, saved = refine(far, even)
    assert saved > 0.1
    assert found.stage[3] == found.stage[4]
    elsewhere = replace(near, device=device.with_ranks(Numbering(4, 2, "replicas")))
    assert elsewhere.step_s(even.stage, even.option) > far.step_s(even.stage, even.option) * 0.99


# -- what is not of a stage and its neighbours -----------------------------------------------------


def test_the_optimizer_counts_by_what_the_fullest_rank_holds() -> None:
    plain = model_of([1.0] * 6, [0.0] * 5, 2, 4)
    stage, option = (0, 0, 0, 0, 1, 1), (0,) * 6
    moved = 6e9
    stepping = replace(plain, stepping_bytes=moved)
    more = stepping.step_s(stage, option) - plain.step_s(stage, option)
    assert more == pytest.approx(H100.moved_s(moved * 4 / 6))


def test_launches_count_where_the_host_is_slower_than_kernels() -> None:
    plain = model_of([1e-6] * 4, [0.0] * 3, 2, 4)
    table = table_of("h100")
    many = [replace(each, launches=(10, 20)) for each in plain.prices]
    device = replace(plain.device, table=table)
    priced = replace(plain, prices=many, device=device)
    found = priced._compute_s((0, 0, 1, 1), (0,) * 4)
    assert found[0, Kind.F] == pytest.approx(20 * table.host_s)
    assert found[1, Kind.B] == pytest.approx(40 * table.host_s)
    assert plain._compute_s((0, 0, 1, 1), (0,) * 4)[0, Kind.F] == pytest.approx(2e-6)


def test_messages_between_stages_that_are_no_neighbours_are_simulated() -> None:
    """A tied gradient leaves the last stage with every microbatch, which takes the processor."""
    plain = model_of([1.0] * 4, [0.0] * 3, 4, 8)
    tied = Value(3, (0,), receive_s=0.5)
    device = replace(plain.device, send_share=1.0)
    one, other = (
        replace(plain, device=device, problem=replace(plain.problem, values=values))
        for values in ((), (tied,))
    )
    stage, option = (0, 1, 2, 3), (0,) * 4
    assert far_of(other._transfer_s(stage)) == ((3, 0),)
    assert other.step_s(stage, option) >= one.step_s(stage, option) + 0.8 * 8 * 0.5
    searched = [each.searched_s(stage, option) for each in (one, other)]
    assert searched[1] >= searched[0] + 0.8 * 8 * 0.5

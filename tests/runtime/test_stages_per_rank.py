"""Ranks that hold several stages: meshes and schedules made by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pipecompile.compiler.driver.compiled import Compiled
from pipecompile.compiler.ir.actions import Action, Kind, Schedule
from pipecompile.compiler.ir.program import PipelineProgram
from pipecompile.compiler.memory.footprint import Footprint
from pipecompile.compiler.memory.rank_memory import rank_memory
from pipecompile.compiler.trace import figures
from pipecompile.compiler.trace.reading import read_trace
from pipecompile.compiler.trace.trace import Lane
from pipecompile.passes.schedule.communication import add_communication
from pipecompile.passes.schedule.exchange import add_exchange, verify_exchange
from pipecompile.passes.schedule.verify import verify_schedule
from pipecompile.runtime import start
from pipecompile.runtime.transport.mesh import Mesh, world_size
from pipecompile.runtime.transport.neighbours import SWITCH
from support import jobs, measured, models, plain
from support.chrome import checked
from support.gang import Gang
from support.matrix import quickly

Placement = tuple[tuple[int, ...], ...]

LOOPED: Placement = ((0, 2), (1, 3))
V: Placement = ((0, 3), (1, 2))
ONE: Placement = ((0, 1, 2, 3),)
MICROBATCHES, STEPS = 4, 2


def interleaved(program: PipelineProgram, placement: Placement, microbatches: int) -> Schedule:
    """Every rank runs, of what is ready, the deepest backward, else the deepest forward."""
    rows: list[list[Action]] = [[] for _ in placement]
    done: set[Action] = set()

    def ready(action: Action) -> bool:
        stage, kind, index = action.stage, action.kind, action.microbatch
        if index == microbatches:
            return False
        if kind is Kind.F:
            return stage == 0 or Action(stage - 1, Kind.F, index) in done
        if kind is Kind.B and stage + 1 < len(program.stages):
            return Action(stage + 1, Kind.B, index) in done
        return Action(stage, Kind.F if kind is Kind.B else Kind.B, index) in done

    def choose(row: list[Action], stages: tuple[int, ...]) -> Action | None:
        for kind in (Kind.B, Kind.F, Kind.W):
            for stage in sorted(stages, reverse=True):
                if kind in program.stages[stage].parts:
                    index = sum((a.stage, a.kind) == (stage, kind) for a in row)
                    if ready(action := Action(stage, kind, index)):
                        return action
        return None

    while any(chosen := [choose(*each) for each in zip(rows, placement, strict=True)]):
        for row, action in zip(rows, chosen, strict=True):
            if action is not None:
                row.append(action)
                done.add(action)
    return tuple(map(tuple, rows))


def scheduled(compiled: Compiled, placement: Placement, dp: int) -> Compiled:
    """The same graph, on other ranks."""
    program, microbatches = compiled.program, compiled.plan.microbatches
    schedule = interleaved(program, placement, microbatches)
    schedule = add_communication(schedule, program.messages)
    verify_schedule(schedule, program.messages, microbatches, program.trains)
    schedule = add_exchange(schedule, program, dp, compiled.layout.zero)
    verify_schedule(schedule, program.messages, microbatches, program.trains)
    verify_exchange(schedule, program, dp, compiled.layout.zero)
    return replace(compiled, schedule=schedule)


def pipeline(name: str, placement: Placement, dp: int = 1, **options: Any) -> Any:
    """A compiled test model on a mesh by hand, as this process's rank or as all ranks."""
    n_stages = sum(map(len, placement))
    mesh = Mesh(n_stages, dp, int(os.environ["RANK"]) if world_size() else None, placement)
    with mock.patch.object(start, "make_mesh", return_value=mesh):
        pipe = jobs.pipeline(name, n_stages, dp, MICROBATCHES, **options)
    builder = pipe._loader._builder
    build = builder.build
    builder.build = lambda *args, **more: scheduled(build(*args, **more), placement, dp)
    return pipe


def batches(name: str, dp: int = 1) -> list[models.Batch]:
    return models.batches(name, 2 * dp * MICROBATCHES, STEPS)


def train(name: str, placement: Placement, dp: int = 1, **options: Any) -> plain.Trained:
    return plain.train_pipeline(pipeline(name, placement, dp, **options), batches(name, dp))


def oracle(name: str, dp: int = 1) -> plain.Trained:
    return jobs.train_plainly(name, dp, MICROBATCHES, "adamw", STEPS)


def test_a_mesh_knows_who_holds_what() -> None:
    mesh = Mesh(4, 2, None, V)
    assert (mesh.pp, mesh.size) == (2, 4)
    assert [mesh.stages_of(rank) for rank in range(4)] == [(0, 3), (1, 2)] * 2
    assert [mesh.rank_of(1, stage) for stage in range(4)] == [2, 3, 3, 2]
    assert mesh.replicas_of(2) == mesh.peers_of(1) == mesh.peers_of(3) == (1, 3)
    plainly = Mesh(3, 2, None)
    assert (plainly.pp, plainly.size) == (3, 6)
    assert [plainly.stages_of(rank) for rank in range(6)] == [(0,), (1,), (2,)] * 2
    assert [plainly.rank_of(1, stage) for stage in range(3)] == [3, 4, 5]


@pytest.mark.parametrize(
    ("name", "placement", "schedule"),
    [
        pytest.param("llama", LOOPED, "1f1b", marks=pytest.mark.slow),
        ("llama", V, "zb_h1"),
        ("gpt2", V, "1f1b"),  # the tied weight is on one rank
        ("gpt2", LOOPED, "zb_h1"),  # and on two
        # a value is handed over, and sent to another stage
        pytest.param("bart", LOOPED, "1f1b", marks=pytest.mark.slow),
        pytest.param("bart", V, "1f1b", marks=pytest.mark.slow),
    ],
)
def test_training_is_exact_in_one_process(name: str, placement: Placement, schedule: str) -> None:
    plain.assert_equal(train(name, placement, schedule=schedule), oracle(name))


@pytest.mark.parametrize(
    ("name", "placement"),
    quickly([("gpt2", V)], product(("llama", "gpt2"), (LOOPED, V))),
)
def test_training_is_exact_in_processes(
    gang: Callable[[int], Gang], name: str, placement: Placement
) -> None:
    expected = oracle(name)
    for found in gang(2).run(train, name, placement):
        plain.assert_equal(found, expected, whole=False)


@pytest.mark.parametrize("placement", [LOOPED, V])
def test_tied_parts_are_summed_once_per_step(placement: Placement) -> None:
    """In another order than microbatch by microbatch: equal up to rounding."""
    found = train("gpt2", placement, tied_grads="per_step")
    for mine, theirs in zip(found.grads, oracle("gpt2").grads, strict=True):
        for name, grad in mine.items():
            assert torch.allclose(grad, theirs[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_replicas_divide_what_ranks_of_several_stages_hold(
    gang: Callable[[int], Gang], zero: int
) -> None:
    """As if each stage had a rank of its own."""
    options = {"schedule": "zb_h1", "zero": zero}
    apart = jobs.train("llama", 4, 2, MICROBATCHES, "adamw", STEPS, **options)
    together = train("llama", LOOPED, 2, **options)
    plain.assert_equal(together, apart)
    for found in gang(4).run(train, "llama", LOOPED, 2, **options):
        plain.assert_equal(replace(found, grads=[]), replace(apart, grads=[]), whole=False)


@pytest.mark.parametrize("zero", quickly([1], [0, 1, 2, 3]))
def test_replicas_divide_a_weight_that_two_stages_of_a_rank_read(
    gang: Callable[[int], Gang], zero: int
) -> None:
    """It leaves once, when both have added to it."""
    apart = jobs.train("gpt2", 4, 2, MICROBATCHES, "adamw", STEPS, zero=zero)
    for found in gang(4).run(train, "gpt2", V, 2, zero=zero):
        plain.assert_equal(replace(found, grads=[]), replace(apart, grads=[]), whole=False)


@pytest.mark.slow
def test_evaluation_and_outputs_are_those_of_one_stage_per_rank() -> None:
    batch = batches("gpt2")[0]
    ours, theirs = pipeline("gpt2", V), jobs.pipeline("gpt2", 4, 1, MICROBATCHES)
    assert torch.equal(ours.evaluate(batch), theirs.evaluate(batch))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    assert torch.equal(ours.forward(inputs).logits, theirs.forward(inputs).logits)


@pytest.mark.slow
def test_a_checkpoint_opens_under_other_ranks(tmp_path: Path) -> None:
    first, *_ = batches("gpt2")
    ours, theirs = pipeline("gpt2", V), jobs.pipeline("gpt2", 3, 1, MICROBATCHES)
    ours.step(first)
    ours.save(tmp_path)
    theirs.compile_for(first)
    theirs.load(tmp_path)
    assert torch.equal(ours.step(first), theirs.step(first))
    there = theirs.state_dict()
    assert all(torch.equal(value, there[name]) for name, value in ours.state_dict().items())


# -- traces ---------------------------------------------------------------------------------------


def record(folder: Path) -> None:
    pipe = pipeline("llama", V)
    with pipe.trace(folder / "run.json"):
        for batch in batches("llama"):
            pipe.step(batch)


def test_a_trace_names_the_stages_of_a_rank(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    gang(2).run(record, tmp_path)
    events = checked(tmp_path / "run.json")
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["rank 0: stages 0, 3", "rank 1: stages 1, 2"]
    trace = read_trace(tmp_path / "run.json")
    assert {(s.rank, s.name[0]) for s in trace.of(Lane.COMPUTE)} == {
        (rank, str(stage)) for rank, stages in enumerate(V) for stage in stages
    }
    assert set(figures.compute_seconds(trace)) == {
        (s, k) for s in range(4) for k in (Kind.F, Kind.B)
    }
    assert set(figures.waiting(trace)) == {(0, 1), (1, 0)}


# -- memory ---------------------------------------------------------------------------------------


def peaks(placement: Placement) -> tuple[int, int]:
    """Measured and predicted, of the first of this process's ranks, with messages as gloo has them:
    those in memory that processes share are no tensors of theirs."""
    torch.manual_seed(1)
    batch = models.tokens(2 * MICROBATCHES, 32)
    with mock.patch.dict(os.environ, {SWITCH: "off"}):
        pipe = pipeline("llama", placement)
    pipe.step(batch)
    compiled, state = pipe.compiled, pipe._session.state
    footprint = Footprint(state.skeleton.module, jobs.OPTIMIZERS["adamw"])
    actions = compiled.schedule[state.mesh.rank or 0]
    stages, program = state.mesh.stages_of(state.mesh.rank or 0), compiled.program
    static = footprint.static(program, stages, sum(leaf.nbytes for leaf in batch.values()))
    moment = footprint.optimizer_bytes(program, stages)
    predicted = rank_memory(program, actions, static, 1, moment)
    return measured.peak_bytes(pipe, batch), predicted.peak_bytes


@pytest.mark.slow
def test_a_rank_with_all_stages_holds_what_is_predicted() -> None:
    """But for the losses of the microbatches, what they count, and their mean."""
    found, predicted = peaks(ONE)
    assert 0 <= found - predicted <= 4 * (2 * MICROBATCHES + 1)


@pytest.mark.slow
@pytest.mark.parametrize("placement", [LOOPED, V])
def test_ranks_with_several_stages_hold_what_is_predicted(
    gang: Callable[[int], Gang], placement: Placement
) -> None:
    """But for a message on its way out."""
    for found, predicted in gang(2).run(peaks, placement):
        assert predicted == pytest.approx(found, rel=0.05)

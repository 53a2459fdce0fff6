"""Hints are true: what they promise is what compiling with the change gives."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import pytest
import torch
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.costs.hardware import CPU, Device
from pipecompile.compiler.driver.builder import Builder
from pipecompile.compiler.driver.compiled import Compiled, Mode
from pipecompile.compiler.options.microbatches import divide
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.options.parsing import parse_bytes
from pipecompile.compiler.planning.target import Target
from pipecompile.compiler.report.compare import calibrated
from pipecompile.compiler.report.hints import Subject, hints, resimulated
from pipecompile.compiler.report.quantities import bytes_text, seconds_text
from support import models
from support.matrix import quickly
from support.plans import hand_made
from torch import nn

HOST = torch.device("cpu")
FAST_LINK = CPU.with_link(1e15, 0.0)


def subject(
    model: nn.Module,
    rows: int,
    device: Device = FAST_LINK,
    budget: float = float("inf"),
    **options: object,
) -> tuple[Subject, Compiled]:
    given = CompileOptions(optimizer=torch.optim.AdamW, costs="roofline", **options)  # type: ignore[arg-type]
    spec, microbatches = divide(flatten(models.tokens(rows))[1], given, given.dp)
    builder = Builder(skeleton_of(model, HOST), given, Target(HOST, device, budget))
    compiled = builder.build(Mode.TRAIN, spec, microbatches)
    assert compiled.problem is not None
    problem = calibrated(compiled.problem, compiled.plan)
    return Subject(compiled.plan, compiled.timeline, device, problem, given.remat), compiled


def found(about: Subject, start: str) -> str:
    """The one hint that starts so, or nothing."""
    return "".join(line for line in hints(about) if line.startswith(start))


@functools.cache
def small(schedule: str = "1f1b", microbatches: int = 4) -> tuple[Subject, Compiled]:
    return subject(
        models.gpt2(), microbatches, CPU, n_stages=2, microbatches=microbatches, schedule=schedule
    )


@pytest.mark.slow
@pytest.mark.parametrize("schedule", quickly(["1f1b"], ["1f1b", "zb_h1"]))
def test_simulating_again_is_compiling_again(schedule: str) -> None:
    """More microbatches of the same size, to the last few bits."""
    about, compiled = small(schedule)
    assert resimulated(about).step_s == pytest.approx(compiled.timeline.step_s, rel=1e-12)
    _, larger = small(schedule, 8)
    assert larger.plan.decision.unit_stage == compiled.plan.decision.unit_stage
    then = resimulated(about, microbatches=8)
    assert then.step_s == pytest.approx(larger.timeline.step_s, rel=1e-9)
    assert then.bubble == pytest.approx(larger.timeline.bubble, rel=1e-9)


def test_more_microbatches() -> None:
    about, _ = small()
    line = found(about, "--microbatches")
    then = resimulated(about, microbatches=int(line.split()[1]))
    assert f"would be {then.bubble:.1%} instead of {about.plan.bubble:.1%}" in line
    assert then.bubble < about.plan.bubble


def test_more_microbatches_must_fit() -> None:
    about, _ = small(microbatches=1)
    assert found(about, "--microbatches")
    full = max(stage.memory.peak for stage in about.plan.stages)
    assert not found(replace(about, plan=replace(about.plan, budget_bytes=full)), "--microbatches")


def test_tied_gradients_per_step_send_so_much_less() -> None:
    about, compiled = small()
    line = found(about, "--tied-grads per_step")
    _, changed = subject(models.gpt2(), 4, CPU, n_stages=2, microbatches=4, tied_grads="per_step")
    sent = [
        4 * sum(t.bytes for stage in plan.stages for t in stage.sends)
        for plan in (compiled.plan, changed.plan)
    ]
    assert f"{bytes_text(sent[0] - sent[1])} per step" in line
    assert f"{(sent[0] - sent[1]) / sent[0]:.0%} of all that is sent" in line
    assert f"would take {seconds_text(changed.plan.step_s)} instead" in line
    about_changed = Subject(changed.plan, changed.timeline, CPU)
    assert not found(about_changed, "--tied-grads")


@pytest.mark.slow
def test_transfers_that_nothing_hides() -> None:
    slow = CPU.with_link(1e6, 0.0)
    about, _ = subject(models.llama(), 4, slow, n_stages=2, microbatches=4)
    _, faster = subject(
        models.llama(), 4, CPU.with_link(2e6, 0.0), n_stages=2, microbatches=4,
        pin=None,
    )  # fmt: skip
    line = found(about, "transfers that nothing hides")
    assert faster.plan.decision.unit_stage == about.plan.decision.unit_stage
    assert f"twice as fast: {seconds_text(faster.plan.step_s)} instead of" in line
    free, _ = subject(models.llama(), 4, n_stages=2, microbatches=4)
    assert not found(free, "transfers")


@pytest.mark.slow
def test_a_head_that_is_nearly_a_stage() -> None:
    about, compiled = subject(
        models.gpt2(vocab_size=20_000), 12, n_stages=3, microbatches=12, tied_grads="per_step"
    )
    line = found(about, "stage 2 is the slowest because of one unit, ")
    assert "lm_head" in line
    seconds = [sum(each) for each in compiled.plan.decision.unit_seconds]
    assert seconds_text(max(seconds)) in line
    assert "3 stages cannot be even, 1 could" in line
    unnamed = replace(about, problem=None)
    assert "one unit, number " in found(unnamed, "stage 2")


@pytest.mark.slow
def test_what_pins_cost() -> None:
    about, _ = subject(models.llama(), 8, n_stages=2, microbatches=8, pin={"model.layers": 1})
    free, _ = subject(models.llama(), 8, n_stages=2, microbatches=8)
    line = found(about, "without --pin the step would take")
    assert seconds_text(free.plan.decision.search.objective_s) in line
    assert not found(free, "without --pin")


@pytest.mark.slow
def test_recomputation_that_is_not_needed() -> None:
    full, compiled = subject(models.llama(), 4, n_stages=2, microbatches=4, remat="full")
    assert "--remat auto recomputes nothing" in found(full, "recomputation is ")
    peak = max(stage.memory.peak for stage in compiled.plan.stages)
    roomy = replace(full, plan=replace(full.plan, budget_bytes=4 * peak))
    assert "uses 25% of the budget: --remat auto" in found(roomy, "recomputation is ")
    tight = replace(full, plan=replace(full.plan, budget_bytes=peak))
    assert not found(tight, "recomputation is ")


@pytest.mark.slow
def test_how_much_memory_would_spare_recomputation() -> None:
    free, _ = subject(models.llama(), 128, n_stages=2, microbatches=2)
    needs = max(stage.memory.peak for stage in free.plan.stages)
    about, _ = subject(models.llama(), 128, budget=0.4 * needs, n_stages=2, microbatches=2)
    line = found(about, "recomputation is ")
    suggested = re.search(r"with --memory ([\d.]+MiB) there would be none", line)
    assert suggested
    enough = parse_bytes(suggested[1], "memory")
    again, _ = subject(models.llama(), 128, budget=enough, n_stages=2, microbatches=2)
    assert not any(stage.recompute_s for stage in again.plan.stages)
    then, now = again.plan.decision.search.bound_s, about.plan.decision.search.objective_s
    assert f"would take {1 - then / now:.0%} less" in line


@pytest.mark.slow
def test_room_for_fewer_stages() -> None:
    about, _ = subject(models.llama(), 8, budget=2**30, n_stages=4, microbatches=8)
    line = found(about, "the fullest stage uses ")
    assert "1 × dp 4 on the same 4 ranks would fit" in line
    alone, _ = subject(models.llama(), 8, budget=2**30, n_stages=1, dp=4, microbatches=2)
    assert seconds_text(alone.plan.decision.search.objective_s) in line
    narrow = replace(about, plan=replace(about.plan, budget_bytes=about.plan.stages[0].memory.peak))
    assert not found(narrow, "the fullest stage uses ")


def test_nothing_to_say() -> None:
    plan, timeline = hand_made()
    assert not list(hints(Subject(plan, timeline, FAST_LINK)))

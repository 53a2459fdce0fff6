"""Eager programs add products while they are made only where that changes no bit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.ir import ops
from pipecompile.compiler.ir.actions import Kind
from pipecompile.compiler.ir.ops import Slot
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.runtime import world
from pipecompile.runtime.kernels import rounding
from pipecompile.runtime.kernels.rounding import (
    LEAST_ELEMENTS,
    MOST_TERMS,
    kernels_now,
    rounds_alike,
)
from pipecompile.runtime.state.bucket import GradSlot
from support import jobs, models, plain
from support.gang import Gang
from support.measured import peak_bytes
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

TRIED = (4, 32, 256, 384, 512)


def row_major(rows: int, columns: int) -> rounding.Layout:
    return (rows, columns), (columns, 1)


def alike(terms: int, rows: int = 48, columns: int = 40) -> bool:
    across = (rows, terms), (1, rows)  # xᵀ
    layouts = across, row_major(terms, columns), row_major(rows, columns)
    return rounds_alike(*layouts, torch.float32, kernels_now())


@pytest.fixture
def anew() -> Iterator[None]:
    """Nothing is remembered of trials, before and after."""
    rounds_alike.cache_clear()
    yield
    rounds_alike.cache_clear()


def running(pipe: Any) -> Counter[str]:
    """How gradients are added by the programs that run, of all ranks of this process."""
    executors = next(iter(pipe._session.loaded.values())).executors.values()
    return Counter(
        node.target.__name__
        for executor in executors
        for stage in executor.stages.values()
        for bound in stage.parts.values()
        for node in bound.program.module.graph.nodes
        if node.target in (ops.accumulate, ops.accumulate_product, ops.accumulate_rows)
    )


@pytest.mark.parametrize("terms", TRIED)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, float("inf")])
def test_what_a_trial_says_holds_for_other_numbers(terms: int, scale: float) -> None:
    """Sums of a few microbatches: ordinary numbers, tiny ones, overflows, zeros of both signs."""
    if not alike(terms):
        pytest.skip("these kernels add in more than one block")
    at_once, apart = GradSlot(torch.empty(48, 40)), GradSlot(torch.empty(48, 40))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed + 1)
        left = torch.randn(terms, 48, generator=generator).t() * scale
        right = torch.randn(terms, 40, generator=generator)
        right[:, seed] = -0.0
        at_once.add_product(left, right)
        Slot.add_product(apart, left, right)
        torch.testing.assert_close(
            at_once.tensor, apart.tensor, rtol=0, atol=0, equal_nan=scale == float("inf")
        )
        assert torch.equal(at_once.tensor.signbit(), apart.tensor.signbit()) or scale > 1e30


def test_a_trial_sees_another_order_of_additions() -> None:
    """Some length has several blocks: there a trial has to say no, as kernels round otherwise."""
    lengths = [1 << n for n in range(3, 15)]
    for terms in lengths:
        generator = torch.Generator().manual_seed(3)
        total = torch.randn(48, 40, generator=generator)
        left = torch.randn(terms, 48, generator=generator).t()
        right = torch.randn(terms, 40, generator=generator)
        same = torch.equal(total + left @ right, total.clone().addmm_(left, right))
        assert alike(terms) == same, terms
    assert not alike(lengths[-1])


@pytest.mark.parametrize("answer", [True, False])
def test_programs_that_run_add_what_rounds_alike(
    monkeypatch: pytest.MonkeyPatch, answer: bool
) -> None:
    """Those that plans are made of stay as they are."""
    monkeypatch.setattr(rounding, "rounds_alike", lambda *_: answer)
    pipe = jobs.pipeline("llama", 2, 1, 2)
    pipe.compile_for(models.batches("llama", 4, 1)[0])
    found = running(pipe)
    assert bool(found["accumulate_product"]) == answer
    planned = [
        node
        for stage in pipe.compiled.program.stages
        for program in stage.parts.values()
        for node in program.module.graph.find_nodes(op="call_function", target=ops.accumulate)
    ]
    assert len(planned) == found.total()


def test_long_sums_and_narrow_dtypes_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(rounding, "rounds_alike", lambda *how: asked.append(how) or True)
    monkeypatch.setattr(rounding, "MOST_TERMS", 1)
    pipe = jobs.pipeline("llama", 1, 1, 2)
    pipe.compile_for(models.batches("llama", 4, 1)[0])
    assert not asked
    assert not running(pipe)["accumulate_product"]
    monkeypatch.setattr(rounding, "MOST_TERMS", MOST_TERMS)
    pipe = jobs.pipeline("llama", 1, 1, 2, precision="bf16")
    pipe.compile_for(models.batches("llama", 4, 1)[0])
    assert not asked


def more_threads() -> None:
    torch.set_num_threads(torch.get_num_threads() + 1)


@pytest.mark.parametrize(
    "change", [more_threads, lambda: torch.set_float32_matmul_precision("medium")]
)
def test_other_kernels_are_another_trial(anew: None, change: Callable[[], None]) -> None:
    batches = models.batches("gpt2", 4, 2)
    pipe = jobs.pipeline("gpt2", 1, 1, 2)
    pipe.step(batches[0])
    before, threads = rounds_alike.cache_info().misses, torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    assert before
    change()
    try:
        pipe.step(batches[1])
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    assert rounds_alike.cache_info().misses == 2 * before


class Asking(nn.Module):
    """A learned query, the same for every row, and a gate of one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Parameter(torch.randn(1, 1, 16))
        self.asks, self.reads = (nn.Linear(16, 16, bias=False) for _ in range(2))
        self.gate = nn.Linear(1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> CausalLMOutput:
        asked = self.asks(self.query.expand(len(x), 1, -1))
        read = self.reads(x)
        gate = self.gate((asked * read).mean(-1, keepdim=True))
        return CausalLMOutput(loss=(asked + gate * read).square().mean())


def test_what_a_trial_tells_little_of_is_made_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few elements, and factors that repeat their rows."""
    asked: list[rounding.Layout] = []

    def tried(*how: Any) -> bool:
        asked.extend(how[:3])
        return rounds_alike(*how)

    monkeypatch.setattr(rounding, "rounds_alike", tried)
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(12, 1, 16, generator=generator)} for _ in range(3)]
    pipe = pipecompile.compile(Asking(), 1, microbatches=4, optimizer=jobs.SGD)
    found = plain.train_pipeline(pipe, batches)
    plain.assert_equal(found, plain.train(Asking(), batches, jobs.SGD, 1, 4))
    assert len(asked) == 3  # of one product: its factors, and where it goes
    assert math.prod(asked[2][0]) == LEAST_ELEMENTS


def test_what_is_timed_adds_as_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "rounds_alike", lambda *_: True)
    pipe = jobs.pipeline("gpt2", 1, 1, 2)
    pipe.compile_for(models.batches("gpt2", 4, 1)[0])
    (stage,) = pipe.compiled.program.stages
    for zero, adds in ((0, True), (1, True), (2, False)):
        timed = world._backend(CompileOptions(n_stages=1, dp=2, zero=zero, backend="eager"))
        parts = timed.compiled(stage, torch.device("cpu")).parts
        (backward,) = (program for kind, program in parts.items() if kind is Kind.B)
        found = backward.module.graph.find_nodes(op="call_function", target=ops.accumulate_product)
        assert len(found) == (running(pipe)["accumulate_product"] if adds else 0)


def test_peaks_of_measured_plans_are_those_of_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest gradient is not made where the step is at its fullest."""
    monkeypatch.setattr(rounding, "rounds_alike", lambda *_: True)
    batch = models.batches("llama", 4, 1)[0]
    peaks = {}
    for costs in ("roofline", "profile"):
        pipe = jobs.pipeline("llama", 1, 1, 2, costs=costs, example_batch=batch)
        pipe.step(batch)
        assert running(pipe)["accumulate_product"]
        peaks[costs] = pipe.plan.stages[0].memory.peak, peak_bytes(pipe, batch)
    planned, found = peaks["profile"]
    assert planned == pytest.approx(found, rel=0.003)
    assert found == peaks["roofline"][1] < peaks["roofline"][0]


def train(zero: int) -> tuple[plain.Trained, Counter[str]]:
    pipe = jobs.pipeline("gpt2", 1, 2, 2, zero=zero)
    found = plain.train_pipeline(pipe, models.batches("gpt2", 8, 2))
    return found, running(pipe)


@pytest.mark.parametrize("zero", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_replicas_have_the_bits_of_gradients_that_are_made_first(
    monkeypatch: pytest.MonkeyPatch, gang: Callable[[int], Gang], zero: int
) -> None:
    """At level 1 too, where whole gradients leave with the last microbatch."""
    made = gang(2).run(train, zero)
    monkeypatch.setattr(rounding, "rounds_alike", lambda *_: False)
    expected, apart = train(zero)
    assert not apart["accumulate_product"]
    for found, added in made:
        plain.assert_equal(replace(found, grads=[]), replace(expected, grads=[]))
        assert added["accumulate_product"] > 0 or not alike(32)


@pytest.mark.parametrize("zero", [2, 3])
def test_what_leaves_with_every_microbatch_is_made_first(zero: int) -> None:
    pipe = jobs.pipeline("gpt2", 1, 2, 2, zero=zero, zero_keep="nothing")
    pipe.compile_for(models.batches("gpt2", 4, 1)[0])
    assert not running(pipe)["accumulate_product"]

"""fp16: the loss is scaled, and a step whose gradients overflow is skipped on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pipecompile
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipecompile import LossScale, Precision
from pipecompile.runtime.state.accumulation import Accumulation
from pipecompile.runtime.stepping.loss_scaler import LossScaler
from support import jobs, models, plain
from support.autocast import FP16, FP32, Summed, small
from support.gang import Gang
from support.matrix import quickly
from torch import nn


@pytest.mark.slow
def test_the_scale_falls_until_gradients_are_finite_and_grows_again() -> None:
    """Step by step what torch's GradScaler does, from a scale that is far too large."""
    batch = models.batches("gpt2", 4, 6)
    precision = Precision(compute=FP16, loss_scale=LossScale(init=2.0**21, interval=2))
    pipe = jobs.pipeline("gpt2", 2, 1, 2, precision=precision)
    found = plain.train_pipeline(pipe, batch)
    model = models.build("gpt2")
    expected = plain.train(
        model, batch, jobs.OPTIMIZERS["adamw"], 1, 2, dtype=FP16, init_scale=2.0**21, interval=2
    )
    plain.assert_equal(found, expected)
    skipped = sum(not grads for grads in expected.grads)
    assert pipe.loss_scaler.skipped == skipped > 0
    assert skipped < len(batch)
    state = pipe.loss_scaler.state_dict()
    other = jobs.pipeline("gpt2", 2, 1, 2, precision=precision)
    other.loss_scaler.load_state_dict(state)
    assert other.loss_scaler.state_dict() == state


@given(st.lists(st.booleans(), max_size=20), st.integers(1, 4), st.integers(0, 20))
def test_the_scale_is_that_of_torchs_scaler(finite: list[bool], interval: int, at: int) -> None:
    """After any steps, also where another scaler goes on: good steps are counted from the last
    overflow, and from the last growth."""
    config = LossScale(init=2.0**10, growth=4.0, backoff=0.25, interval=interval)
    scaler = LossScaler(config)
    scale, count = torch.tensor(config.init), torch.tensor(0, dtype=torch.int32)
    for step, good in enumerate(finite):
        if step == at:
            state, scaler = scaler.state_dict(), LossScaler(config)
            scaler.load_state_dict(state)
        scaler.saw(True)
        scaler.saw(good)  # a step has several runs
        scaler.end_step()
        scaler.end_step()  # nothing has run since
        found = torch.tensor(float(not good))
        torch._amp_update_scale_(scale, count, found, 4.0, 0.25, interval)
        assert scaler.scale == float(scale)
    assert scaler.skipped == finite.count(False)


@pytest.mark.slow
@pytest.mark.parametrize("grads", quickly([FP16], [FP32, FP16]))
def test_gradients_of_several_calls_add_up_unscaled(grads: torch.dtype) -> None:
    batch = models.batches("gpt2", 8, 1)[0]
    precision = Precision(compute=FP16, grads=grads, loss_scale=LossScale(init=2.0**10))
    pipe = jobs.pipeline("gpt2", 2, 2, 2, precision=precision)
    pipe.forward_backward(batch)
    once = {name: param.grad.clone() for name, param in pipe.named_parameters()}
    pipe.forward_backward(batch)
    for name, param in pipe.named_parameters():
        assert torch.allclose(param.grad, 2 * once[name], rtol=1e-2, atol=1e-3), name
    model = models.build("gpt2")
    plain.accumulate(model, batch, 2, 2)
    for name, grad in once.items():
        assert torch.allclose(grad, model.get_parameter(name).grad, rtol=0.05, atol=1e-3), name


class Optional(nn.Module):
    """Reads a part of its weights only where it is given ``y``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        hidden = torch.tanh(self.a(x))
        return self.b(hidden if y is None else hidden + self.c(y)).square().mean()


def test_an_overflow_is_forgotten_where_the_next_program_reads_less() -> None:
    sgd = partial(torch.optim.SGD, lr=1e-3)
    pipe = pipecompile.compile(
        Optional(), 1, microbatches=1, precision="fp16", optimizer=sgd, device="cpu"
    )
    pipe.step({"x": small(), "y": small(large=True)})
    assert pipe.loss_scaler.skipped == 1
    for _ in range(3):
        pipe.step({"x": small()})
    assert pipe.loss_scaler.skipped == 1


def test_one_overflow_spoils_all_runs_of_a_step() -> None:
    sgd = partial(torch.optim.SGD, lr=1e-3)
    scale = LossScale(init=2.0**10, interval=2)
    precision = Precision(compute=FP16, loss_scale=scale)
    pipe = pipecompile.compile(
        Summed(nn.Linear(8, 8)),
        1,
        microbatches=1,
        precision=precision,
        optimizer=sgd,
        device="cpu",
    )

    def step(*batches: torch.Tensor) -> bool:
        pipe.compile_for(small())
        before = [param.detach().clone() for param in pipe.parameters()]
        for batch in batches:
            pipe.forward_backward(batch)
        pipe.optimizer.step()
        pipe.zero_grad()
        return any(not torch.equal(a, b) for a, b in zip(before, pipe.parameters(), strict=True))

    assert not step(small(large=True), small())
    assert pipe.loss_scaler.scale == 2.0**9
    assert step(small(), small())
    assert pipe.loss_scaler.scale == 2.0**9
    assert step(small(), small())
    assert pipe.loss_scaler.scale == 2.0**10


def test_fp64_gradients_are_unscaled_too() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.t = nn.Linear(8, 8), nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.lin(x).double() * self.t).square().mean().float()

    model, x = Mixed(), torch.randn(2, 8)
    pipe = pipecompile.compile(model, 1, microbatches=1, precision="fp16", device="cpu")
    pipe.forward_backward(x)
    with plain.autocast(FP16):
        loss = model(x)
    (loss * 2.0**16).backward()
    for name, param in pipe.named_parameters():
        assert torch.allclose(param.grad, model.get_parameter(name).grad / 2.0**16, rtol=1e-6), name


def overflowing(rank: int, steps: int, at: int) -> dict[str, Any]:
    """One gradient of one rank becomes infinite in one step."""
    batch = models.batches("llama", 8, steps)
    pipe = jobs.pipeline(
        "llama", 2, 1, 4, precision="fp16", max_grad_norm=0.1, lr_scheduler=_halving
    )
    unscale = Accumulation.unscale

    def broken(sums: Accumulation, scale: float) -> bool:
        mine = sums._state.ranks.get(rank)
        if mine is not None and pipe._steps == at:
            next(iter(mine.grads.slots.values())).tensor.view(-1)[0] = torch.inf
        return unscale(sums, scale)

    Accumulation.unscale = broken  # type: ignore[method-assign]
    scales, params = [], []
    try:
        for piece in batch:
            pipe.step(piece)
            scales.append(pipe.loss_scaler.scale)
            params.append({n: p.detach().clone() for n, p in pipe.named_parameters()})
    finally:
        Accumulation.unscale = unscale  # type: ignore[method-assign]
    counts = {int(state["step"]) for state in pipe.optimizer.state.values()}
    return {
        "scales": scales,
        "params": params,
        "counts": counts,
        "lr": pipe.optimizer.param_groups[0]["lr"],
    }


def _halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.parametrize("rank", quickly([1], [0, 1]))
def test_an_overflow_on_one_stage_skips_the_step_on_all(
    gang: Callable[[int], Gang], rank: int
) -> None:
    for found in gang(2).run(overflowing, rank, 3, 1):
        assert found["scales"] == [2.0**16, 2.0**15, 2.0**15]
        first, second, third = found["params"]
        assert all(torch.equal(first[n], second[n]) for n in first)
        assert any(not torch.equal(second[n], third[n]) for n in first)
        assert found["counts"] == {2}
        assert found["lr"] == pytest.approx(1e-2 / 4)

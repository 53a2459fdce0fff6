"""Complex parameters: their gradients are clipped, divided and checked as two real numbers each."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pipecompile
import pytest
import torch
from support import plain
from support.matrix import quickly
from torch import nn

ADAMW = partial(torch.optim.AdamW, lr=1e-2)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.filter = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))
        self.phase = nn.Parameter(torch.tensor(1 + 2j))
        self.second = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        made: torch.Tensor = torch.fft.fft(self.first(x)) @ self.filter * self.phase
        return SimpleNamespace(loss=self.second(made.abs()).square().mean())


@pytest.mark.parametrize(
    ("options", "exact"),
    [({}, True), ({"dp": 2, "zero": 1}, False), ({"dp": 2, "zero": 2}, False)],
)
def test_clipped_steps(options: dict[str, Any], exact: bool) -> None:
    torch.manual_seed(0)
    model = Spectral()
    pipe = pipecompile.compile(
        copy.deepcopy(model), 2, microbatches=1, optimizer=ADAMW, max_grad_norm=0.5, **options
    )
    optimizer = ADAMW(model.parameters())
    for _ in range(2):
        plain.accumulate(model, {"x": X}, options.get("dp", 1), 1)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        pipe.step({"x": X})
    found, expected = pipe.state_dict(), model.state_dict()
    assert plain.equal(found, expected) or not exact
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("seed", quickly([0, 5], range(6)))
def test_the_norm_of_several_dtypes_is_that_of_torch(seed: int) -> None:
    """It takes them dtype by dtype."""
    torch.manual_seed(seed)
    model, x = Spectral(), torch.randn(4, 8)
    pipe = pipecompile.compile(copy.deepcopy(model), 2, microbatches=1)
    model(x).loss.backward()
    pipe.forward_backward(x)
    assert pipe.clip_grad_norm_(0.5) == nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def test_loss_scaling_sees_what_is_not_finite() -> None:
    model = Spectral()
    pipe = pipecompile.compile(model, 2, optimizer=ADAMW, precision="fp16", max_grad_norm=1.0)
    for _ in range(12):
        pipe.step(X)
    assert pipe.loss_scaler.skipped < 12
    scale = pipe.loss_scaler.scale
    pipe.step(torch.full_like(X, float("inf")))
    assert pipe.loss_scaler.scale == scale / 2

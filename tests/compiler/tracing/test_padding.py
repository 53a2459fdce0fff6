"""`nn.TransformerEncoder` in evaluation, which returns zeros for padding."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pipecompile
import pytest
import torch
from support import jobs
from torch import nn

WIDTH, ROWS, LENGTH = 8, 4, 5


@pytest.fixture(autouse=True)
def _of_nested_tensors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        yield


class Encoding(nn.Module):
    traced_once = True

    def __init__(self, normed: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        norm = nn.LayerNorm(WIDTH) if normed else None
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 1, norm, **options)
        self.outer = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.encoder(self.inner(x), src_key_padding_mask=padding)
        return {"loss": self.outer(states).square().mean(), "states": states}


def batch(lengths: list[int], start: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    place = torch.arange(LENGTH)
    kept = (place >= start) & (place < start + torch.tensor(lengths)[:, None])
    return {"x": torch.randn(ROWS, LENGTH, WIDTH), "padding": ~kept}


RIGHT, LEFT = batch([5, 3, 4, 2]), batch([4, 3, 4, 2], start=1)
ADDED = RIGHT | {"padding": torch.zeros(ROWS, LENGTH).masked_fill(RIGHT["padding"], -torch.inf)}


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (RIGHT, {}),
        (RIGHT, {"normed": True}),
        pytest.param(RIGHT, {"enable_nested_tensor": False}, marks=pytest.mark.slow),
        pytest.param(RIGHT, {"mask_check": False}, marks=pytest.mark.slow),
        (LEFT, {}),
        pytest.param(ADDED, {"normed": True}, marks=pytest.mark.slow),
    ],
)
def test_evaluation_is_that_of_one_device(rows: dict[str, Any], options: dict[str, Any]) -> None:
    """But for the last bits: one device runs fused kernels."""
    model = Encoding(**options)
    pipe = pipecompile.compile(copy.deepcopy(model), 2, microbatches=1, optimizer=jobs.SGD)
    assert torch.equal(pipe.step(rows), model(**rows)["loss"].detach())
    model.load_state_dict(pipe.state_dict())
    with torch.no_grad():
        expected = model.eval()(**rows)
    assert torch.allclose(pipe.evaluate(rows), expected["loss"], rtol=1e-5)
    assert torch.allclose(pipe.forward(rows)["states"], expected["states"], atol=1e-5)
    nests = rows is not LEFT and options.get("enable_nested_tensor", True)
    pads = not expected["states"][RIGHT["padding"]].any()
    assert pads == (nests and not model.encoder.norm)


def test_a_frozen_encoder_in_training() -> None:
    model = Encoding()
    model.encoder.requires_grad_(False).eval()
    model.inner.requires_grad_(False)
    pipe = pipecompile.compile(copy.deepcopy(model), 2, microbatches=1, optimizer=jobs.SGD)
    assert torch.allclose(pipe.step(RIGHT), model(**RIGHT)["loss"].detach(), rtol=1e-5)


@pytest.mark.slow
def test_verify_allows_what_fused_kernels_round() -> None:
    pipe = pipecompile.compile(Encoding(), 2, microbatches=2, optimizer=jobs.SGD, verify=1)
    pipe.step(RIGHT)
    assert "nn.TransformerEncoderLayer in one kernel" in pipe.verification

"""The comparison that the examples print: equal where it should be, and only there."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from support.matrix import quickly
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"


class Classifier(nn.Module):
    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def batches() -> list[dict[str, torch.Tensor]]:
    """Of 7 rows with 4 labels each, of which some do not count."""
    torch.manual_seed(1)
    labels = torch.randint(3, (3, 7, 4)).masked_fill(torch.rand(3, 7, 4) < 0.3, -100)
    return [{"x": torch.randn(7, 4, 6), "labels": each} for each in labels]


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, lr: float, **given: Any
) -> str:
    """Of a pipeline that trains with ``lr=0.1``, and one device with another."""
    monkeypatch.syspath_prepend(EXAMPLES)
    compare = importlib.import_module("common.compare").compare
    training = {"optimizer": partial(torch.optim.SGD, lr=0.1), "microbatches": 3} | given
    pipe = pipecompile.compile(Classifier(), 2, **training)
    losses = [pipe.step(batch) for batch in batches()]
    training["optimizer"] = partial(torch.optim.SGD, lr=lr)
    compare(pipe, Classifier(), batches(), losses, **training)
    return capsys.readouterr().out


GIVEN: list[dict[str, Any]] = [{"dp": 2, "max_grad_norm": 0.1}, {"precision": "bf16"}, {}]


@pytest.mark.parametrize("given", quickly(GIVEN[:1], GIVEN))
def test_one_device_is_equal_with_labels_that_do_not_count(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = printed(monkeypatch, capsys, lr=0.1, **given)
    assert "losses equal: 3 of 3\nparameters equal: 4 of 4\n" in out


def test_what_differs_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = printed(monkeypatch, capsys, lr=0.2)
    assert "losses equal: 1 of 3, at most " in out  # the first step had the same parameters
    assert "parameters equal: 0 of 4, at most " in out

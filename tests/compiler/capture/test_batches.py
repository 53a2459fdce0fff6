"""What of a batch makes another program, and what of it reaches model and loss."""

from __future__ import annotations

import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pipecompile
import pytest
import torch
from pipecompile import errors
from pipecompile.compiler.capture.batch import flatten
from support import models
from torch import nn

X = torch.randn(4, 8)
SGD = partial(torch.optim.SGD, lr=0.1)


class Scaled(nn.Module):
    """Reads ``scale``, and of ``**kwargs`` only ``factor``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor, scale: Any = 1, **others: Any) -> torch.Tensor:
        made: torch.Tensor = self.layers(x) * scale * others.get("factor", 1)
        return made.square().mean()


def compiled(model: nn.Module, **options: Any) -> Any:
    return pipecompile.compile(model, 2, microbatches=1, optimizer=SGD, **options)


NAN = float("nan")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1),
        (1.5, 1.5),
        (NAN, -NAN),
        ("text", "text"),
        (np.float32(2), np.float32(2)),
        (torch.float16, torch.float16),
        (nn.Linear, nn.Linear),
        ([1, {"a": 2}], [1, {"a": 2}]),
    ],
)
def test_equal_values_share_a_program(one: Any, other: Any) -> None:
    first, second = (flatten({"x": X, "value": value})[1] for value in (one, other))
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        (1.0, np.float64(1)),
        ("1", 1),
        (None, False),
        ([1], [1, 1]),
    ],
)
def test_values_that_models_may_tell_apart_do_not(one: Any, other: Any) -> None:
    assert flatten({"x": X, "value": one})[1] != flatten({"x": X, "value": other})[1]


@pytest.mark.parametrize(
    "value", [np.ones(3), np.ones(()), {1, 2}, SimpleNamespace(a=1), nn.Linear(1, 1)]
)
def test_values_that_cannot_be_compared(value: Any) -> None:
    with pytest.raises(errors.BatchError, match=r"'value' is a .* give tensors"):
        flatten({"x": X, "value": value})


def test_every_process_describes_values_alike() -> None:
    text = flatten({"x": X, "value": [1.5, compiled]})[1].described()
    assert text.startswith("x: float32[4, 8] ((1, 1.5), (2, <function compiled")
    assert "0x" not in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("extra", [{"factor": 3}, {"count": 48, "wants_all": True}, {"scale": 2.0}])
def test_plain_values_reach_kwargs(extra: dict[str, Any]) -> None:
    model = Scaled()
    assert compiled(model).evaluate({"x": X} | extra) == model(X, **extra)


def test_a_tensor_that_only_kwargs_swallow() -> None:
    model = Scaled()
    with pytest.warns(UserWarning, match=r"Scaled takes 'mask' as \*\*kwargs and reads none"):
        assert compiled(model).evaluate({"x": X, "mask": X}) == model(X, mask=X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(model).evaluate({"x": X, "factor": X}) == model(X, factor=X)


def test_plain_values_reach_loss_fn() -> None:
    def loss_fn(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return output * batch["weight"]

    model = models.Residual(2)
    batch = {"x": X, "weight": 3, "unread": "text"}
    assert compiled(model, loss_fn=loss_fn).evaluate(batch) == model(X) * 3


def test_plain_values_reach_kwargs_beside_loss_fn() -> None:
    model = Scaled()
    pipe = compiled(model, loss_fn=lambda output, batch: output * batch["factor"])
    assert pipe.evaluate({"x": X, "factor": 3}) == model(X, factor=3) * 3
    assert pipe.evaluate({"x": X, "factor": torch.tensor(3)}) == model(X) * 3

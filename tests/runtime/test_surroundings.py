"""What the caller has switched on around a call: it changes nothing, or it is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import errors
from support import models
from support.matrix import quickly

X = torch.randn(4, 8)
ADAMW = partial(torch.optim.AdamW, lr=1e-2)
Context = Callable[[], contextlib.AbstractContextManager[Any]]


def compiled(**options: Any) -> Any:
    torch.manual_seed(0)
    return pipecompile.compile(models.Residual(3), 2, optimizer=ADAMW, **options)


def numbers(around: Context, folder: Path, **options: Any) -> list[torch.Tensor]:
    """Losses of calls of every kind, each other one inside of something."""
    with around():
        pipe = compiled(**options)
        seen = [pipe.evaluate(X)]
    seen.append(pipe.step(X))
    with around():
        seen.append(pipe.step(X))
        pipe.save(folder)
        pipe.load_state_dict(pipe.state_dict())
        pipe.load(folder)
        pipe.forward_backward(X)
    pipe.optimizer.step()
    pipe.zero_grad()
    return [*seen, pipe.step(X), pipe.evaluate(X)]


@pytest.mark.parametrize(
    "options",
    quickly(
        [{"dp": 2, "zero": 3, "precision": "fp16"}],
        [{}, {"precision": "bf16"}, {"dp": 2, "zero": 3, "precision": "fp16"}],
    ),
)
@pytest.mark.parametrize(
    "around", quickly([torch.inference_mode], [torch.inference_mode, torch.no_grad])
)
def test_modes_without_gradients_change_nothing(
    tmp_path: Path, around: Context, options: dict[str, Any]
) -> None:
    plainly = numbers(contextlib.nullcontext, tmp_path / "plain", **options)
    found = numbers(around, tmp_path / "around", **options)
    assert found == plainly
    assert not any(loss.is_inference() for loss in found)


def test_automatic_stages_under_inference_mode() -> None:
    with torch.inference_mode():
        pipe = pipecompile.compile(
            models.Residual(3), "auto", devices=2, optimizer=ADAMW, example_batch=X
        )
    pipe.step(X)


def test_a_batch_that_was_made_under_inference_mode() -> None:
    with torch.inference_mode():
        batch = X.clone()
    pipe, other = compiled(), compiled()
    assert [pipe.step(batch), pipe.step(batch)] == [other.step(X), other.step(X)]


REFUSED: list[tuple[Context, str]] = [
    (lambda: torch.autocast("cpu", torch.bfloat16), r"give compile\(\) precision="),
    (lambda: torch.device("meta"), r"torch.device\('meta'\) is active around a pipeline on 'cpu'"),
]


@pytest.mark.parametrize(("around", "message"), REFUSED)
@pytest.mark.parametrize("stages", [{}, {"n_stages": "auto", "devices": 2, "example_batch": X}])
def test_what_models_would_obey_is_refused(
    around: Context, message: str, stages: dict[str, Any]
) -> None:
    model, pipe = models.Residual(3), compiled()
    with around():
        with pytest.raises(errors.OptionError, match=message):
            pipecompile.compile(model, **{"n_stages": 2} | stages)
        for call in (pipe.step, pipe.evaluate, pipe.forward, pipe.compile_for):
            with pytest.raises(errors.OptionError, match=message):
                call(X)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Shifted(models.Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.full((8,), 1 / 3))


def test_another_default_dtype_is_refused() -> None:
    """A program has the dtype of what it makes; one that is traced later may have another one."""
    model = Shifted(2)
    pipe = pipecompile.compile(model, 2, microbatches=1)
    assert pipe.evaluate(X) == model(X)
    with (
        default_dtype(torch.float64),
        pytest.raises(errors.OptionError, match=r"dtype is torch.float64 and was torch.float32"),
    ):
        pipe.evaluate(X)

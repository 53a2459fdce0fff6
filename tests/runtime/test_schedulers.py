"""Learning rate schedulers: `step` steps those that need no metric."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import errors
from support import models
from torch.optim import lr_scheduler

SGD = partial(torch.optim.SGD, lr=1.0)
X = torch.randn(4, 8)
PLATEAU = partial(lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0)


def compiled(scheduler: Any, n_stages: int = 2) -> Any:
    torch.manual_seed(0)
    return pipecompile.compile(
        models.Residual(2), n_stages, optimizer=SGD, lr_scheduler=scheduler, example_batch=X
    )


def rate(pipe: Any) -> float:
    return float(pipe.optimizer.param_groups[0]["lr"])


def test_a_scheduler_that_needs_a_metric_is_the_users_to_step() -> None:
    pipe = compiled(PLATEAU)
    for metric, expected in ((1.0, 1.0), (2.0, 0.5), (0.5, 0.5), (0.6, 0.25)):
        pipe.step(X)
        pipe.lr_scheduler.step(metric)
        assert rate(pipe) == expected


def test_its_state_is_in_checkpoints(tmp_path: Path) -> None:
    pipe, other = compiled(PLATEAU), compiled(PLATEAU, 1)
    pipe.step(X)
    pipe.lr_scheduler.step(1.0)
    pipe.save(tmp_path)
    other.load(tmp_path)
    assert other.lr_scheduler.state_dict() == pipe.lr_scheduler.state_dict()
    other.lr_scheduler.step(2.0)
    assert rate(other) == 0.5


class Own:
    """Has no signature that says so, and no optimizer."""

    def __init__(self, _: Any) -> None:
        self.steps = 0

    def step(self, *_: Any, **__: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize(
    "make",
    [
        Own,
        partial(lr_scheduler.StepLR, step_size=1),
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 1)]),
    ],
)
def test_others_are_stepped(make: Any) -> None:
    pipe = compiled(make)
    pipe.step(X)
    pipe.step(X)
    assert pipe.lr_scheduler.steps == 2 if make is Own else rate(pipe) == pytest.approx(0.01)


def test_asking_for_a_scheduler_that_was_not_given() -> None:
    with pytest.raises(errors.OptionError, match="was given no lr_scheduler"):
        _ = compiled(None).lr_scheduler

"""What ranks have to do alike, where nothing is exchanged when they do it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from support.gang import Gang
from support.labelled import loss_of
from torch import nn
from torch.optim.lr_scheduler import StepLR

BATCH = {"input": torch.ones(4, 4), "label": torch.ones(4, dtype=torch.long)}


def pipeline(dp: int) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model.traced_once = True  # type: ignore[assignment]
    return pipecompile.compile(
        model,
        2 // dp,
        dp,
        microbatches=2,
        optimizer=torch.optim.SGD,
        lr_scheduler=partial(StepLR, step_size=1),
        loss_fn=loss_of,
        example_batch=BATCH,
    )


def _other(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The last one is another on each rank."""
    *_, last = tensors
    return tensors | {last: tensors[last] + rank}


def disagrees(name: str, dp: int, folder: Path) -> tuple[str, bool]:
    """What a rank is told after it has done something otherwise, and whether its weights stay."""
    pipe, rank = pipeline(dp), int(os.environ["RANK"])
    pipe.step(BATCH)
    pipe.forward_backward(BATCH)
    before = pipe.state_dict()
    calls: dict[str, Callable[[], Any]] = {
        "zero_grad": lambda: pipe.zero_grad() if rank else None,
        "optimizer": lambda: pipe.optimizer.step() if rank else None,
        "clip value": lambda: pipe.clip_grad_value_(1.0 + rank),
        "clip norm": lambda: pipe.clip_grad_norm_(1.0 + rank),
        "scheduler": lambda: pipe.lr_scheduler.step() if rank else None,
        "rate": lambda: pipe.optimizer.param_groups[0].update(lr=0.1 + rank),
        "restart": lambda: pipe.restart(before, optimizer=partial(torch.optim.SGD, lr=0.1 + rank)),
        "weights": lambda: pipe.load_state_dict(_other(before, rank)),
        "restarted weights": lambda: pipe.restart(_other(before, rank)),
        "average": lambda: pipe.averaged() if rank else None,
        "what is left out": lambda: pipe.save(folder, trainable_only=bool(rank)),
        "who gets it": lambda: pipe.forward(BATCH, gather="all" if rank else "main"),
    }
    text = "nothing"
    try:
        calls[name]()
        pipe.step(BATCH)
    except pipecompile.errors.PipecompileError as error:
        text = f"{type(error).__name__}: {error}"
    pipe.evaluate(BATCH)  # it is told once: who catches it goes on
    held = dict(pipe.named_parameters())
    return text, all(torch.equal(held[n].detach(), before[n]) for n in held)


CALLS = [
    ("zero_grad", 1, "rank 0 has called nothing, and rank 1 zero_grad(): every rank must"),
    ("optimizer", 1, "rank 0 has called nothing, and rank 1 pipe.optimizer.step(): every rank"),
    ("clip value", 1, "has called clip_grad_value_(1), and rank 1 clip_grad_value_(2): every"),
    ("clip norm", 1, "rank 0 is in clip_grad_norm_(1) (call 5) and rank 1 in clip_grad_norm_(2)"),
    ("scheduler", 1, "the LR scheduler of rank 1 is at epoch 2 and that of rank 0 at 1: call its"),
    ("rate", 2, "ranks 0 and 1 step copies of the same parameters with the learning rates (0.1,)"),
    ("restart", 2, "with the learning rates (0.1,) and (1.1,): set them alike on every rank"),
    ("weights", 1, "load_state_dict() was given other values of '2.bias' on rank"),
    ("restarted weights", 2, "restart() was given other values of '2.bias' on rank"),
    ("average", 1, "rank 0 has called nothing, and rank 1 AveragedWeights 'averaged': every"),
    ("what is left out", 1, "rank 0 is in save() (call 5) and rank 1 in save(trainable_only=True)"),
    ("who gets it", 1, "is in forward(gather='main') (call 5) and rank 1 in forward(gather='all')"),
]


@pytest.mark.parametrize(("name", "dp", "message"), CALLS)
def test_what_one_rank_does_otherwise_is_told_to_all_before_the_next_step(
    gang: Callable[[int], Gang], tmp_path: Path, name: str, dp: int, message: str
) -> None:
    for rank, (text, same) in enumerate(gang(2).run(disagrees, name, dp, tmp_path)):
        assert message in text
        assert same or (name, rank) in (("optimizer", 1), ("restart", 0), ("restart", 1))


def alike(dp: int) -> list[float]:
    """A loop of the user's, in which nothing differs."""
    pipe = pipeline(dp)
    average, losses = pipe.averaged(), []
    for _ in range(3):
        losses.append(float(pipe.forward_backward(BATCH)))
        pipe.clip_grad_value_(0.5)
        pipe.clip_grad_norm_(0.1, norm_type=1)
        pipe.optimizer.step()
        pipe.lr_scheduler.step()
        pipe.zero_grad()
        average.update()
        pipe.end_step()
    pipe.load_state_dict(pipe.state_dict())
    return losses


@pytest.mark.parametrize("dp", [1, 2])
def test_what_all_do_alike_is_no_error(gang: Callable[[int], Gang], dp: int) -> None:
    first, second = gang(2).run(alike, dp)
    assert first == second
    assert first[2] < first[0]

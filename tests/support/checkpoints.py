"""Pipelines that are saved and resumed, and what has to be equal afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import errors
from pipecompile.runtime.files import checksums
from torch import nn

from support import jobs, models, plain

INDEX, PART = "checkpoint.json", "part-00000.safetensors"
LR_SCHEDULER = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1, 3])


def pipeline(n_stages: int, dp: int, microbatches: int = 4, **options: Any) -> Any:
    """GPT-2 with dropout, clipping and a scheduler, compiled for batches of 8 rows."""
    torch.manual_seed(0)
    whole = models.batches("gpt2", 8, 1)[0]
    torch.manual_seed(0)
    options = {
        "optimizer": jobs.OPTIMIZERS["adamw"],
        "lr_scheduler": LR_SCHEDULER,
        "max_grad_norm": 0.1,
        "seed": 5,
        **options,
    }
    world = int(os.environ.get("WORLD_SIZE", "1"))
    example = plain.cut(whole, dp if world > 1 else 1)[0]
    return pipecompile.compile(
        models.gpt2(dropout=0.1, n_layer=2),
        n_stages,
        dp,
        microbatches=microbatches,
        example_batch=example,
        **options,
    )


def steps(pipe: Any, first: int, last: int) -> list[torch.Tensor]:
    """The losses of steps first to last - 1; batch i is the same in every run."""
    batches = models.batches("gpt2", 8, last)[first:]
    shares = [plain.cut(batch, pipe.data_shards)[pipe.data_shard] for batch in batches]
    return [pipe.step(share) for share in shares]


def optimizer_states(pipe: Any) -> dict[str, Any]:
    return {name: dict(pipe.optimizer.state[param]) for name, param in pipe.named_parameters()}


def resumed(directory: str, n_stages: int, dp: int, microbatches: int = 4) -> Any:
    """Load what was saved after 2 steps; the losses of 2 more, and the parameters."""
    pipe = pipeline(n_stages, dp, microbatches)
    assert pipe.load(directory) == 2
    return steps(pipe, 2, 4), pipe.state_dict()


def saved(directory: str, n_stages: int, dp: int, microbatches: int = 4) -> Any:
    """Train 2 steps, save, and 2 more; the losses of those, and the parameters."""
    pipe = pipeline(n_stages, dp, microbatches)
    steps(pipe, 0, 2)
    pipe.save(directory)
    return steps(pipe, 2, 4), pipe.state_dict()


class Small(nn.Module):
    """A tied weight, a buffer that is updated, one that is not kept, a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.third.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.register_buffer("passing", torch.ones(6), persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.norm(self.second(self.first(x)).relu())
        x = self.third(x) * self.scale * self.frozen * self.passing
        return {"loss": x.square().mean()}


def small(n_stages: int, optimizer: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    example = torch.ones(8, 6)
    return pipecompile.compile(
        Small(), n_stages, microbatches=2, optimizer=optimizer, example_batch=example, **options
    )


def rows(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def mixed(named: Any) -> torch.optim.Optimizer:
    """Groups with settings of their own, one of them a tensor; empty on some stages."""
    named = list(named)
    matrices = [p for _, p in named if p.dim() > 1]
    rest = [p for _, p in named if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "name": "rest"}]
    return torch.optim.AdamW(groups, lr=torch.tensor(0.01), betas=(0.8, 0.9))


OPTIMIZERS = {
    "sgd": jobs.SGD,
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, amsgrad=True),
    "groups": mixed,
    "fused": partial(torch.optim.AdamW, fused=True),
} | {
    name: getattr(torch.optim, name)
    for name in ("NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "ASGD", "Rprop", "Adafactor")
}


class Position:
    """Where a data loader is."""

    def __init__(self, at: Any = 0):
        self.at = at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(errors.CheckpointError) as caught:
        call()
    return str(caught.value)


def edit(step: Path, change: Callable[[Any], Any], sealed: bool = True) -> None:
    """Change a checkpoint's index, as one who gives it the right checksum."""
    fields = json.loads((step / INDEX).read_text())
    del fields["checksum"]
    change(fields)
    text = json.dumps(fields)
    (step / INDEX).write_bytes(checksums.sealed(text) if sealed else text.encode())

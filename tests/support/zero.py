"""What tests of ZeRO share: its levels, parcels that are small, and trainings of several kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from pipecompile.compiler.ir import shards
from torch import nn

from support import jobs, models, plain

LEVELS = (1, 2, 3)


class Odd(nn.Module):
    """Fewer rows than replicas, a scalar, a frozen layer, a transposed layout."""

    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.one = nn.Parameter(torch.randn(1, 7))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Linear(7, 7)
        self.turned = nn.Parameter(torch.randn(7, 5).t())
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x) + self.one) * self.scale
        return (self.frozen(hidden) + x @ self.turned).square().mean()


def small_parcels(least_bytes: int = 4 << 10) -> Any:
    """Around a function or a block: several are under way, and tensors are cut into pieces."""
    return mock.patch.object(shards, "LEAST_BYTES", least_bytes)


def compiled(n_stages: int, dp: int, **options: Any) -> Any:
    """A pipeline for batches of 12 rows, whatever the replicas are."""
    pipe = jobs.pipeline("gpt2", n_stages, dp, 12 // dp, **options)
    pipe.compile_for(plain.cut(models.batches("gpt2", 12, 1)[0], pipe.data_shards)[0])
    return pipe


def save(pipe: Any, folder: str) -> dict[str, Any]:
    """Two steps, then a checkpoint; the state."""
    for batch in models.batches("gpt2", 12, 2):
        pipe.step(plain.cut(batch, pipe.data_shards)[pipe.data_shard])
    pipe.save(folder, async_save=True)
    pipe.wait_for_save()
    state: dict[str, Any] = pipe.state_dict()
    return state


def accumulate(pipe: Any, batches: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of four batches two before each step, gradients kept, evaluation in between, an LR schedule;
    the state, and the last loss and norm."""
    shares = [batch.chunk(pipe.data_shards)[pipe.data_shard] for batch in batches]
    pipe.forward_backward(shares[0])
    schedule = torch.optim.lr_scheduler.ExponentialLR(pipe.optimizer, 0.5)
    for first, second in (shares[:2], shares[2:]):
        pipe.zero_grad()
        pipe.forward_backward(first)
        loss = pipe.evaluate(second)
        pipe.forward_backward(second)
        norm = pipe.clip_grad_norm_(0.01)
        pipe.optimizer.step()
        schedule.step()
    state = pipe.state_dict()
    pipe.load_state_dict(state)
    return {**state, "loss": loss, "norm": norm}


def assert_equal(found: plain.Trained, expected: plain.Trained) -> None:
    """Losses, norms and parameters, bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(found.losses, expected.losses, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found.norms, expected.norms, strict=True))
    assert not [n for n, p in expected.params.items() if not torch.equal(found.params[n], p)]

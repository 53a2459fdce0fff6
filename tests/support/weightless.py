"""Models without weights, and where theirs may come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipecompile
import torch
from torch import nn

from support import jobs, models

CPU = torch.device("cpu")
State = dict[str, torch.Tensor]


def empty(name: str) -> nn.Module:
    with torch.device("meta"):
        return models.build(name)


def compiled(model: nn.Module, n_stages: int, dp: int = 1, batch: str = "gpt2", **more: Any) -> Any:
    more.setdefault("optimizer", jobs.OPTIMIZERS["sgd"])
    example = models.batches(batch, 4 * dp, 1)[0]
    return pipecompile.compile(
        model, n_stages, dp, microbatches=2, seed=3, example_batch=example, **more
    )


def assert_same(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def saved(model: nn.Module, folder: Path) -> Path:
    """As Hugging Face writes it: several files and an index, tied names left out."""
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).sum()

"""A small classifier over a data set whose batches do not divide evenly, as its user has it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pipecompile
import torch
from torch import nn

WIDTH, CLASSES, WORDS, LENGTH = 8, 4, 16, 6
ROWS, BATCH = 16, 5  # the last batch has one row: a replica has none then
OPTIMIZER = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
Rows = dict[str, torch.Tensor]


class Classifier(nn.Module):
    """Scores a row's classes, and returns what a model of transformers would."""

    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        x = self.table(input_ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        logits = self.head(x.mean(1))  # (rows, classes)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data_set() -> list[Rows]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(WORDS, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


def batches() -> list[Rows]:
    """The global ones, in their order."""
    rows = data_set()
    parts = [rows[at : at + BATCH] for at in range(0, ROWS, BATCH)]
    return [{key: torch.stack([row[key] for row in part]) for key in part[0]} for part in parts]


def pipeline(n_stages: int = 2, dp: int = 2, microbatches: int = 2, **options: Any) -> Any:
    options = {"optimizer": OPTIMIZER, "max_grad_norm": 0.1} | options
    return pipecompile.compile(Classifier(), n_stages, dp, microbatches=microbatches, **options)


def accuracy(output: Any, batch: Rows) -> torch.Tensor:
    return output["logits"].argmax(-1) == batch["labels"]


@torch.no_grad()
def returned(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of all rows in their order, on one device, and their labels."""
    rows = data_set()
    ids = torch.stack([row["input_ids"] for row in rows])
    return model.eval()(ids)["logits"], torch.stack([row["labels"] for row in rows])


def train_plainly(steps: int, schedule: Any) -> tuple[list[float], list[float], Classifier]:
    """Losses, norms, and the model then, of a loop over one device."""
    model = Classifier()
    optimizer = OPTIMIZER(model.parameters())
    scheduler = schedule(optimizer)
    losses, norms = [], []
    for step in range(steps):
        loss = model(**batches()[step])["loss"]
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model

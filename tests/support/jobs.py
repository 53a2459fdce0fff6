"""What the processes of a gang run."""

from __future__ import annotations

from functools import partial
from typing import Any

import pipecompile
import torch

from support import models, plain

SGD = partial(torch.optim.SGD, lr=0.1)
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
}


def pipeline(name: str, n_stages: int, dp: int, microbatches: int, **options: Any) -> Any:
    """A compiled test model; alike in every process."""
    options.setdefault("optimizer", OPTIMIZERS["adamw"])
    return pipecompile.compile(
        models.build(name), n_stages, dp, microbatches=microbatches, **options
    )


def train(
    name: str,
    n_stages: int,
    dp: int,
    microbatches: int,
    optimizer: str,
    steps: int,
    schedule: str = "1f1b",
    **options: Any,
) -> plain.Trained:
    """Train a test model as this process's rank, or as all ranks."""
    options |= {"optimizer": OPTIMIZERS[optimizer], "schedule": schedule}
    pipe = pipeline(name, n_stages, dp, microbatches, **options)
    return plain.train_pipeline(pipe, models.batches(name, 2 * dp * microbatches, steps))


def train_plainly(
    name: str, dp: int, microbatches: int, optimizer: str, steps: int, **options: Any
) -> plain.Trained:
    """The oracle for `train`."""
    return plain.train(
        models.build(name),
        models.batches(name, 2 * dp * microbatches, steps),
        OPTIMIZERS[optimizer],
        dp,
        microbatches,
        **options,
    )

"""What tests of touched rows share: a model with tables of several kinds, and its training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pipecompile
import torch
from torch import nn

from support import jobs, plain

WORDS, WIDTH, SEQ, CLASSES, ROWS = 600, 12, 10, 7, 12  # ROWS: of a global batch
TABLES = {"words.weight", "places", "kinds.weight"}
LAZY = partial(torch.optim.SparseAdam, lr=0.05)
ADAMW = partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1)
OPTIMIZERS: Mapping[str, Any] = {
    **jobs.OPTIMIZERS,
    "plain sgd": jobs.SGD,
    "lazy": pipecompile.Several(
        ("words.*", LAZY), ("places", partial(torch.optim.Adagrad, lr=0.05)), ("*", ADAMW)
    ),
}


class Tables(nn.Module):
    """Words with a pad that has no gradient, places looked up by an index, kinds on the last stage;
    a row of the head's table is looked up too, which makes it none."""

    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.places = nn.Parameter(torch.randn(8 * SEQ, WIDTH))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.kinds = nn.Embedding(40, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: torch.Tensor, kinds: torch.Tensor, labels: torch.Tensor) -> Any:
        x = self.words(ids) + self.places[torch.arange(ids.shape[1]) * 3]  # (rows, SEQ, WIDTH)
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        x = x + self.kinds(kinds)[:, None] + self.head.weight[labels[:, :1]]
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def build() -> nn.Module:
    torch.manual_seed(0)
    return Tables()


def batches(count: int, first: int = 0) -> list[dict[str, torch.Tensor]]:
    """Of which some rows are pads alone, so that replicas touch other numbers of rows."""
    made = []
    for seed in range(first, first + count):
        chance = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, WORDS, (ROWS, SEQ), generator=chance)
        ids[0, 3:] = ids[1] = 0
        labels = torch.randint(0, CLASSES, (ROWS, SEQ), generator=chance)
        kinds = torch.randint(0, 40, (ROWS,), generator=chance)
        made.append({"ids": ids, "kinds": kinds, "labels": labels})
    return made


def pipeline(
    rows: str, n_stages: int = 1, dp: int = 2, optimizer: str = "plain sgd", **options: Any
) -> Any:
    """Args:
    rows: ``sparse_embeddings=``.
    """
    options = {"microbatches": 2, "max_grad_norm": 0.5, "costs": "roofline"} | options
    pipe = pipecompile.compile(
        build(),
        n_stages,
        dp=dp,
        optimizer=OPTIMIZERS[optimizer],
        sparse_embeddings=rows,
        **options,
    )
    pipe.compile_for(shares(pipe, 1)[0])
    return pipe


def shares(pipe: Any, count: int, first: int = 0) -> list[dict[str, torch.Tensor]]:
    """This process's part of so many batches, from one of them on."""
    return [plain.cut(b, pipe.data_shards)[pipe.data_shard] for b in batches(count, first)]


def train(
    rows: str, n_stages: int, dp: int, optimizer: str = "plain sgd", steps: int = 4, **options: Any
) -> tuple[Any, ...]:
    """(losses, state, of the optimizer, bytes sent per step and those of rows)."""
    pipe = pipeline(rows, n_stages, dp, optimizer, **options)
    losses, before = [], pipe._world.transport.sent_bytes
    for share in shares(pipe, steps):
        losses.append(pipe.step(share))
    sent = (pipe._world.transport.sent_bytes - before) / steps
    return losses, pipe.state_dict(), states(pipe), sent, rows_bytes(pipe) / steps


def states(pipe: Any) -> dict[str, Any]:
    """FQN -> what the optimizer keeps of it, in this process."""
    names = dict(pipe.named_parameters())
    kept = pipe.optimizer.state
    return {name: dict(sorted(kept.get(param, {}).items())) for name, param in names.items()}


def rows_bytes(pipe: Any) -> int:
    """What rank 0 of this process has sent of tables."""
    first = next(iter(pipe._require().state.ranks.values()))
    return 0 if first.grads.touched is None else int(first.grads.touched.sent_bytes)


def grads(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: param.grad.clone() for name, param in pipe.named_parameters()}

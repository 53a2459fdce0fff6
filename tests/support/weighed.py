"""The oracle for losses of whole batches: a plain loop, microbatches weighed by their labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pipecompile.compiler.options.microbatches import cut

from support import models

IGNORED = -100
Batch = dict[str, torch.Tensor]


def parted(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    pieces = {key: value.split(list(sizes)) for key, value in batch.items()}
    return [{key: piece[i] for key, piece in pieces.items()} for i in range(len(sizes))]


def accumulated(
    name: str, batch: Batch, replicas: Sequence[int], microbatches: int, shift: bool
) -> tuple[torch.Tensor, Batch]:
    """The same microbatches in one plain process, each multiplied by its part of the labels."""
    model, dp = models.build(name), len(replicas)

    def count(piece: Batch) -> int:
        labels = piece["labels"]
        return int((labels[:, 1:] if shift else labels).ne(IGNORED).sum())

    total, loss, per_replica = count(batch), torch.zeros((), dtype=torch.float64), []
    for share in parted(batch, replicas):
        rows = len(share["labels"])
        for piece in parted(share, cut(rows, microbatches)):
            if len(piece["labels"]):
                found = model(**piece).loss
                (found * (count(piece) * dp / total)).backward()
                loss += count(piece) / total * found.detach().double()
        per_replica.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    grads = {}
    for key in next(filter(None, per_replica)):
        parts = [each[key] for each in per_replica if each]
        grad = parts[0]
        for other in parts[1:]:
            grad = grad + other
        grads[key] = grad / dp
    return loss.float(), grads

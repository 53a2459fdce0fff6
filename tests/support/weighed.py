"""The oracle for losses of whole batches: a plain loop, microbatches weighed by their labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pipecompile.compiler.options.microbatches import cut
from torch import nn

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

    def count(piece: Batch) -> int:
        labels = piece["labels"]
        return int((labels[:, 1:] if shift else labels).ne(IGNORED).sum())

    def loss_of(model: nn.Module, piece: Batch) -> torch.Tensor:
        loss: torch.Tensor = model(**piece).loss
        return loss

    shares = divided(batch, replicas, microbatches)
    return accumulate(models.build(name), shares, microbatches, count, loss_of)


def divided(batch: Batch, replicas: Sequence[int], microbatches: int) -> list[list[Batch]]:
    """Per replica its microbatches that have rows."""
    shares = parted(batch, replicas)
    pieces = [
        parted(share, cut(rows, microbatches)) for share, rows in zip(shares, replicas, strict=True)
    ]
    return [[piece for piece in each if len(piece["labels"])] for each in pieces]


def accumulate(
    model: nn.Module,
    shares: Sequence[Sequence[Batch]],
    microbatches: int,
    count: Callable[[Batch], int],
    loss_of: Callable[[nn.Module, Batch], torch.Tensor],
) -> tuple[torch.Tensor, Batch]:
    """Loss and gradients of a plain loop over microbatches, each multiplied by what it counts.

    Where there are all ``microbatches`` of each replica and they count as much, it is their mean.
    """
    dp, total = len(shares), sum(count(piece) for share in shares for piece in share)
    losses: list[list[torch.Tensor]] = []
    per_replica = []
    for share in shares:
        losses.append([])
        for piece in share:
            loss = loss_of(model, piece)
            (loss * (count(piece) * dp / total)).backward()
            losses[-1].append(loss.detach())
        per_replica.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    grads = {}
    for key in next(filter(None, per_replica)):
        parts = [each[key] for each in per_replica if each]
        grad = parts[0]
        for other in parts[1:]:
            grad = grad + other
        grads[key] = grad / dp
    counts = [count(piece) for share in shares for piece in share]
    if len(set(counts)) == 1 and len(counts) == dp * microbatches:
        return torch.stack([torch.stack(each).mean() for each in losses]).mean(), grads
    flat = [loss.double() for each in losses for loss in each]
    whole = torch.zeros((), dtype=torch.float64)
    for loss, mine in zip(flat, counts, strict=True):
        whole += mine / total * loss
    return whole.float(), grads

"""A step of one device over pieces of a batch: its loss is the mean over all tokens that count."""

from __future__ import annotations

from typing import Any

import torch

IGNORED = -100
Batch = dict[str, torch.Tensor]


def kept(batch: Batch, shift: int) -> int:
    """The labels that count.

    Args:
        shift: 1 where the model foretells the next token, and 0 where it foretells each.
    """
    return int((batch["labels"][:, shift:] != IGNORED).sum())


def step(
    model: Any, optimizer: torch.optim.Optimizer, batch: Batch, pieces: int, shift: int = 1
) -> torch.Tensor:
    """Over so many pieces, each weighed by the labels that it keeps; the loss of all."""
    losses, weights = [], []
    for i in range(pieces):
        piece = {key: value.chunk(pieces)[i] for key, value in batch.items()}
        losses.append(model(**piece).loss)
        weights.append(kept(piece, shift) / kept(batch, shift))
        (losses[-1] * weights[-1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    pairs = zip(losses, weights, strict=True)
    return torch.stack([loss.detach().double() * weight for loss, weight in pairs]).sum().float()

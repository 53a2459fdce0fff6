"""Short hashes by which ranks compare tensors without sending them."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch

RUNS = 64  # so many parts of a large tensor, of so many elements each


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of a small tensor; of a large one runs that lie evenly from its start to its
    end. Few pages of a mapped file hold them."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= RUNS * RUNS:
        return flat
    return flat.unfold(0, RUNS, (flat.numel() - RUNS) // (RUNS - 1))[:RUNS].reshape(-1)


def digest(values: torch.Tensor) -> str:
    """A hash of the values, in their dtype."""
    data = values.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(cast(Any, data.numpy()).tobytes()).hexdigest()[:16]

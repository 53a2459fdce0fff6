"""What a tensor is called in messages, where it lies, and a short hash of its values, by which
ranks compare tensors without sending them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import torch

from .fakes import is_fake

RUNS = 64  # so many parts of a large tensor, of so many elements each


def short_name(dtype: torch.dtype) -> str:
    """As in ``float32``."""
    return str(dtype).removeprefix("torch.")


def described(shape: Sequence[int], dtype: torch.dtype) -> str:
    """As in ``float32[4, 16]``."""
    return f"{short_name(dtype)}{list(shape)}"


def layout_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """All that matters of a tensor but what is in it."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def extent(tensor: torch.Tensor) -> int:
    """How many elements of memory it spans."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((int(n) - 1) * int(step) for n, step in steps) if tensor.numel() else 0


def storage_of(tensor: torch.Tensor) -> int:
    """Which storage it is in, also where that has no data: views of one have the same number, as
    long as it lives. There is no public name for it."""
    place: int = tensor.untyped_storage()._cdata
    return place


def memory_of(tensor: torch.Tensor) -> tuple[torch.device, int] | None:
    """Where its values are; None where there are none."""
    if tensor.numel() == 0 or is_fake(tensor):
        return None
    try:
        return tensor.device, tensor.untyped_storage().data_ptr()
    except RuntimeError:  # functional tensors look like any other
        return None


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

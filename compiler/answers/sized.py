"""Operators whose results have as many elements as they are told, where ATen's depend on the data.

A graph that was made for one answer of the batch ("how many are there?") has them in the place of
`unique`, `unique_consecutive`, `masked_select` and `bincount`. For `nonzero` ATen has one itself.
They compute with ATen's own kernels, forward and backward, and fail where the number is another.
"""

from __future__ import annotations

from typing import Any

import torch


def _checked(found: torch.Tensor, size: int, dim: int = 0) -> torch.Tensor:
    if found.shape[dim] != size:
        raise RuntimeError(f"the graph was made for {size} elements, and there are {found.shape}")
    return found


def _outlines(x: torch.Tensor, size: int, dim: int | None) -> list[torch.Tensor]:
    """Shapes of values, of inverse indices and of counts."""
    shape = [size] if dim is None else list(x.shape)
    if dim is not None:
        shape[dim] = size
    inverse = x.shape if dim is None else x.shape[dim : dim + 1]
    counted = (list(inverse), [size])
    return [x.new_empty(shape), *(x.new_empty(each, dtype=torch.int64) for each in counted)]


@torch.library.custom_op("pipecompile::unique", mutates_args=())
def unique(x: torch.Tensor, ordered: bool, dim: int | None, size: int) -> list[torch.Tensor]:
    """Values, inverse indices, counts."""
    found = torch.unique(x, ordered, return_inverse=True, return_counts=True, dim=dim)
    _checked(found[0], size, dim or 0)
    return list(found)


@torch.library.custom_op("pipecompile::unique_consecutive", mutates_args=())
def unique_consecutive(x: torch.Tensor, dim: int | None, size: int) -> list[torch.Tensor]:
    """Values, inverse indices, counts."""
    found = torch.unique_consecutive(x, return_inverse=True, return_counts=True, dim=dim)
    _checked(found[0], size, dim or 0)
    return list(found)


@torch.library.custom_op("pipecompile::masked_select", mutates_args=())
def masked_select(x: torch.Tensor, mask: torch.Tensor, size: int) -> torch.Tensor:
    """Of tensors of one shape."""
    return _checked(torch.masked_select(x, mask), size)


@torch.library.custom_op("pipecompile::bincount", mutates_args=())
def bincount(x: torch.Tensor, size: int) -> torch.Tensor:
    """Without weights; ``size`` is that of the result."""
    return _checked(torch.bincount(x, minlength=size), size)


unique.register_fake(lambda x, ordered, dim, size: _outlines(x, size, dim))
unique_consecutive.register_fake(lambda x, dim, size: _outlines(x, size, dim))
masked_select.register_fake(lambda x, mask, size: x.new_empty([size]))
bincount.register_fake(lambda x, size: x.new_empty([size], dtype=torch.int64))


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _scattered(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    """As autograd does it."""
    (mask,) = ctx.saved_tensors
    return grad.new_zeros(mask.shape).masked_scatter(mask, grad), None, None


masked_select.register_autograd(_scattered, setup_context=_keep_mask)

"""Values in 8 bits a number with a scale for each row, as operators of a graph.

A row is the last dimension. What is made of it has its numbers as -127 to 127 times a 127th of the
largest, and the four bytes of that scale behind them, so that one tensor has everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SCALE_BYTES = 4
LEVELS = 127


def in_steps(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., width) of numbers -> the same in int8, and (..., 1) of scales in fp32. A row that is
    not finite has a scale that is not."""
    scales = rows.abs().amax(-1, keepdim=True).float() / LEVELS
    steps = torch.where(scales > 0, scales, 1.0)
    return (rows / steps).round_().to(torch.int8), scales


@torch.library.custom_op("pipecompile::to_int8", mutates_args=())
def to_int8(value: torch.Tensor) -> torch.Tensor:
    """(..., width) -> (..., width + 4) in int8."""
    whole, scales = in_steps(value)
    return torch.cat([whole, scales.view(torch.int8)], -1)


@torch.library.custom_op("pipecompile::from_int8", mutates_args=())
def from_int8(packed: torch.Tensor, stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """(..., width + 4) in int8 -> (..., width), with these strides and in this dtype."""
    whole, scales = packed[..., :-SCALE_BYTES], packed[..., -SCALE_BYTES:]
    wide = whole * scales.contiguous().view(torch.float32)
    return torch.empty_strided(wide.shape, stride, dtype=dtype, device=wide.device).copy_(wide)


@to_int8.register_fake
def _(value: torch.Tensor) -> torch.Tensor:
    *outer, width = value.shape
    return value.new_empty((*outer, width + SCALE_BYTES), dtype=torch.int8)


@from_int8.register_fake
def _(packed: torch.Tensor, stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    *outer, width = packed.shape
    shape = (*outer, width - SCALE_BYTES)
    return torch.empty_strided(shape, stride, dtype=dtype, device=packed.device)


def saves(value: torch.Tensor) -> bool:
    """Whether a value takes fewer bytes so: one of rows of floats that are long enough."""
    if not value.dtype.is_floating_point or not value.dim() or not value.numel():
        return False
    return value.shape[-1] + SCALE_BYTES < value.shape[-1] * value.dtype.itemsize


def packed_nbytes(value: torch.Tensor) -> int:
    return value.numel() // value.shape[-1] * (value.shape[-1] + SCALE_BYTES)

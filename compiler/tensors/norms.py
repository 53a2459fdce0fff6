"""Norms of gradients from what parts of them have, in fp64."""

from __future__ import annotations

import math

import torch

IN_CACHE, AT_ONCE = 1 << 16, 1 << 20
"""Elements of a piece: on a CPU one that stays in its cache, elsewhere for few launches."""


def own_powers(rows: torch.Tensor, kind: float) -> float:
    """The sum of the ``kind``-th powers of absolute values, or the largest one for infinity, in
    fp64, without a second copy of all of them."""
    if kind == 2.0:
        flat = (torch.view_as_real(rows) if rows.is_complex() else rows).reshape(-1)
    else:
        flat = rows.reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    size = IN_CACHE if rows.device.type == "cpu" else AT_ONCE
    for piece in torch.split(flat, size) if flat.numel() else ():
        if kind == 2.0:
            total += piece.double().square_().sum()
        elif math.isinf(kind):
            total = torch.maximum(total, piece.abs().max().double())
        else:
            wide = piece.abs().double()
            total += wide.sum() if kind == 1.0 else wide.pow_(kind).sum()
    return float(total)


def root(powers: list[float], kind: float) -> float:
    """The norm, of what parts of the gradients have of it.

    Args:
        powers: sums of the ``kind``-th powers; of infinity, largest absolute values.
    """
    if any(map(math.isnan, powers)):
        return math.nan
    if math.isinf(kind):
        return max(powers, default=0.0)
    total = math.inf if math.inf in powers else math.fsum(powers)
    return math.sqrt(total) if kind == 2.0 else math.pow(total, 1 / kind)

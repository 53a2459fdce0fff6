"""Operators that refuse values, as those do of which differentiation would leave no check.

Graphs keep what a result depends on. A check has no result: so it stands between one and its
readers, and gives it on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_checking = [True]


@torch.library.custom_op("pipecompile::one_hot", mutates_args=())
def one_hot(indices: torch.Tensor, classes: int) -> torch.Tensor:
    """torch's own, which refuses indices that are out of range."""
    return torch.nn.functional.one_hot(indices, classes)


@torch.library.custom_op("pipecompile::require", mutates_args=())
def require(value: torch.Tensor, holds: torch.Tensor, message: str) -> torch.Tensor:
    """A copy of a value, unless something does not hold: RuntimeError then."""
    if _checking[0]:
        torch._assert_async(holds, message)
    return value.clone()


@contextmanager
def unchecked() -> Iterator[None]:
    """Inside, `require` lets everything pass: for values without a meaning."""
    before, _checking[0] = _checking[0], False
    try:
        yield
    finally:
        _checking[0] = before


@one_hot.register_fake
def _(indices: torch.Tensor, classes: int) -> torch.Tensor:
    return indices.new_empty((*indices.shape, classes))


@require.register_fake
def _(value: torch.Tensor, holds: torch.Tensor, message: str) -> torch.Tensor:
    return torch.empty_like(value)


def _passed_on(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return grad, None, None


require.register_autograd(_passed_on)

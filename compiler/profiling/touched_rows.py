"""Optimizers that are given sparse gradients of some parameters: of the rows that have any.

Gradients stay whole wherever else they are read (clipping, accumulation, `Parameter.grad`), and are
sparse while the optimizer steps alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..tensors.fakes import is_fake
from .standins import Factory, called

TRIED_ROWS = 4
PIECE = 1 << 20  # elements that are looked at at once


def steps_rows(
    factory: Factory,
    names: Collection[str],
    shares: Mapping[str, float] = MappingProxyType({}),
) -> Factory:
    """A factory of the same optimizers, to which the gradients of these parameters are sparse.

    Args:
        names: FQNs of the parameters.
        shares: FQN -> which share of the rows a gradient is taken to have, the first ones, whatever
            is in it; for plans, which step parameters with fewer rows, and gradients without zeros.
    """
    return partial(_made, factory, tuple(sorted(names)), tuple(sorted(shares.items())))


def _made(
    factory: Factory,
    names: Sequence[str],
    shares: Sequence[tuple[str, float]],
    named: Sequence[tuple[str, nn.Parameter]],
) -> torch.optim.Optimizer:
    pairs = list(named)
    optimizer = factory(pairs)
    tables = {name: param for name, param in pairs if name in names}
    whole: dict[str, torch.Tensor] = {}
    share = dict(shares)

    def before(*_: Any) -> None:
        for name, param in tables.items():
            if param.grad is not None:
                whole[name] = param.grad
                param.grad = sparse(param.grad, share.get(name))

    def after(*_: Any) -> None:
        for name, grad in whole.items():
            tables[name].grad = grad
        whole.clear()

    if tables and isinstance(optimizer, torch.optim.Optimizer):
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
    return optimizer


def sparse(grad: torch.Tensor, share: float | None = None) -> torch.Tensor:
    """A gradient as its rows that are not all zeros, (rows, ...); coalesced.

    Args:
        share: of the rows, the first ones, whatever is in them.

    Raises:
        TypeError: the gradient is fake, and torch's fakes of sparse tensors lack operators.
    """
    if is_fake(grad):
        raise TypeError("gradients without data have no sparse form")
    if share is None:
        rows = torch.cat([*map(_any, _pieces(grad))]).nonzero().view(-1)
    else:
        rows = torch.arange(math.ceil(share * len(grad)), device=grad.device)
    return torch.sparse_coo_tensor(
        rows[None],
        grad.index_select(0, rows),
        grad.shape,
        check_invariants=False,
        is_coalesced=True,
    )


def _pieces(table: torch.Tensor) -> Sequence[torch.Tensor]:
    """Its rows, so many at once."""
    width = max(1, table[:1].numel())
    return torch.split(table, max(1, PIECE // width))


def _any(rows: torch.Tensor) -> torch.Tensor:
    """Whether there is a number in each; (rows,)."""
    return (rows.flatten(1) if rows.dim() > 1 else rows[:, None]).ne(0).any(1)


def touched_rows(table: torch.Tensor) -> torch.Tensor:
    """Numbers of the rows that have a bit set; of all others a sum is as it is without them.

    -0 counts, as 0 + -0 and -0 alone differ.
    """
    bits = torch.view_as_real(table) if table.is_complex() else table
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.dtype.itemsize]
    return torch.cat([*map(_any, _pieces(bits.view(whole)))]).nonzero().view(-1)


def why_whole(factory: Factory, params: Mapping[str, torch.Tensor], table: str) -> str:
    """Why an optimizer must be given the whole gradient of a parameter; "" if a sparse one will do.

    It is tried on small parameters.

    Args:
        params: FQN -> a trained parameter, of which only shape and dtype matter.
        table: the one whose gradient is sparse.
    """
    tried = {name: nn.Parameter(_small(param, name == table)) for name, param in params.items()}
    optimizer = called(steps_rows(factory, [table]), list(tried.items()))
    kind, param = type(optimizer).__name__, tried[table]
    for row in range(2):
        param.grad = torch.zeros_like(param)
        param.grad[row] = 0.01
        try:
            optimizer.step()
        except Exception as error:
            return f"{kind} does not step {table!r} so ({type(error).__name__}: {error})"
    for key, state in optimizer.state.get(param, {}).items():
        if isinstance(state, torch.Tensor) and state.is_sparse:
            return f"{kind} makes a sparse {key} of {table!r}, which grows and no checkpoint takes"
    return ""


def _small(param: torch.Tensor, table: bool) -> torch.Tensor:
    """A parameter of few elements, or of one that is seen many times."""
    if table:
        return torch.zeros((TRIED_ROWS, *param.shape[1:]), dtype=param.dtype)
    return torch.zeros((), dtype=param.dtype).expand(param.shape)

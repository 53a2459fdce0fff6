"""A model and the loss that is trained with it, as one module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..ir.errors import OptionError

LOSS = "loss_fn"
"""What the names of a loss's parameters and buffers begin with."""


class WithLoss(nn.Module):
    """A model and a loss that is a module too; never called itself.

    Parameters, buffers and modules have the names that they have in the model, and those of the
    loss follow with `LOSS` before their own.
    """

    def __init__(self, model: nn.Module, loss_fn: nn.Module):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        yield from self.model.named_modules(memo, prefix, remove_duplicate)
        below = f"{prefix}.{LOSS}" if prefix else LOSS
        yield from self.loss_fn.named_modules(memo, below, remove_duplicate)

    def get_submodule(self, target: str) -> nn.Module:
        first, _, rest = target.partition(".")
        return (
            self.loss_fn.get_submodule(rest) if first == LOSS else self.model.get_submodule(target)
        )


def with_loss(model: nn.Module, loss_fn: object) -> nn.Module:
    """The model alone, unless its loss is a module.

    Raises:
        OptionError: both have tensors or modules of one name.
    """
    if not isinstance(loss_fn, nn.Module):
        return model
    if LOSS in (name.partition(".")[0] for name in _names(model)):
        raise OptionError(
            f"loss_fn= is a module, whose tensors are named {LOSS!r}.NAME, and the model has "
            f"an attribute {LOSS!r} too: rename that"
        )
    return WithLoss(model, loss_fn)


def _names(model: nn.Module) -> Iterator[str]:
    yield from (name for name, _ in model.named_children())
    yield from (name for name, _ in model.named_parameters(recurse=False, remove_duplicate=False))
    yield from (name for name, _ in model.named_buffers(recurse=False, remove_duplicate=False))


def model_of(module: nn.Module) -> nn.Module:
    """The model of `with_loss`."""
    return module.model if isinstance(module, WithLoss) else module


def loss_of(module: nn.Module) -> nn.Module | None:
    """The loss of `with_loss`, if it is a module."""
    return module.loss_fn if isinstance(module, WithLoss) else None


def saved(module: nn.Module) -> dict[str, Any]:
    """What the state dicts of model and loss have, with tensors as they are."""
    found = dict(model_of(module).state_dict(keep_vars=True))
    return found | saved_of_loss(module)


def saved_of_loss(module: nn.Module) -> dict[str, Any]:
    """The same of the loss alone, under its names beside the model's."""
    loss = loss_of(module)
    return {} if loss is None else dict(loss.state_dict(prefix=f"{LOSS}.", keep_vars=True))

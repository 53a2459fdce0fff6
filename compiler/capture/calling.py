"""How a batch becomes the arguments of a forward, and where the loss is in what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ir.errors import BatchError, LossError
from . import batch as batches

LossFn = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True)
class Call:
    """Which part of a batch the model is called with.

    Attributes:
        keys: for a dict, the keys passed by name; else None.
        count: for a tuple, how many leading items are passed by position.
        doubtful: keys of tensors that forward does not name: for ``loss_fn``, or else for a
            ``**kwargs``. The graph tells whether they are used.
    """

    keys: tuple[str, ...] | None
    count: int
    doubtful: tuple[str, ...] = ()

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.keys is not None:
            return (), {key: batch[key] for key in self.keys}
        if isinstance(batch, Sequence):
            return tuple(batch[: self.count]), {}
        return (batch,), {}


def bind(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Call:
    """Decide how to call the model with a batch.

    Without ``loss_fn`` the model gets all of the batch. With it, tensors that forward does not
    name are for ``loss_fn`` alone, and so are the items of a tuple beyond what forward takes; what
    is no tensor goes into a ``**kwargs`` too, as nobody can see who reads it.

    Raises:
        BatchError: a key or an item that forward does not take, or a tuple that could be
            divided between model and ``loss_fn`` in more than one way.
    """
    name = type(model).__name__
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if isinstance(batch, Mapping):
        return _bind_keys(name, batch, named, parameters, loss_fn)
    if not isinstance(batch, Sequence):
        return Call(None, 1)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    most = len(batch) if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(positional)
    needed = sum(p.default is p.empty for p in positional)
    if loss_fn is None:
        if len(batch) > most:
            raise BatchError(
                f"the batch has {len(batch)} items, but {name}.forward takes {most}: "
                "drop the rest, or give loss_fn= if they are for the loss"
            )
        return Call(None, len(batch))
    if len(batch) <= needed or len(batch) > most:
        return Call(None, min(len(batch), most))
    if needed == most:
        return Call(None, most)
    raise BatchError(
        f"the batch has {len(batch)} items and {name}.forward takes {needed} to {most}: how many "
        "are for the model and how many for loss_fn is ambiguous; use a dict, whose keys say it"
    )


def check_texts(model: nn.Module, names: Sequence[str]) -> None:
    """Raises BatchError if forward takes what has a text for each row."""
    for name in names:
        if name in inspect.signature(model.forward).parameters:
            raise BatchError(
                f"the batch's {name!r} has a text for each row, which a graph cannot take: encode "
                "it as a tensor, or drop the key"
            )


def _bind_keys(
    name: str,
    batch: Mapping[str, Any],
    named: list[inspect.Parameter],
    parameters: Any,
    loss_fn: LossFn | None,
) -> Call:
    accepted = [p.name for p in named]
    known = tuple(key for key in batch if key in accepted)
    other = tuple(key for key in batch if key not in accepted)
    missing = [p.name for p in named if p.default is p.empty and p.name not in batch]
    if missing:
        raise BatchError(
            f"{name}.forward needs {_listed(missing)}, and the batch holds {_listed(batch)}"
        )
    swallows = any(p.kind is p.VAR_KEYWORD for p in parameters)
    doubtful = tuple(key for key in other if _has_tensors(batch[key]))
    if loss_fn is not None:
        plain = tuple(key for key in other if swallows and key not in doubtful)
        return Call((*known, *plain), 0, doubtful)
    if other and not swallows:
        raise BatchError(
            f"{name} does not take the batch's {_listed(other)}; it takes {_listed(accepted)}: "
            "drop the key, or give loss_fn= if it is for the loss"
        )
    return Call((*known, *other), 0, doubtful)


def _has_tensors(value: Any) -> bool:
    leaves, _ = batches.flatten_arguments(value)
    return any(isinstance(leaf, torch.Tensor) for leaf in leaves)


def find_loss(output: Any, batch: Any, loss_fn: LossFn | None) -> torch.Tensor:
    """The scalar to differentiate.

    That is ``loss_fn(output, batch)`` if given, else ``output.loss``, ``output["loss"]``, or the
    output itself if it is a scalar.

    Raises:
        LossError: there is none, or it is not a floating-point scalar.
    """
    if loss_fn is not None:
        loss, source = loss_fn(output, batch), "what loss_fn returned"
    elif isinstance(output, torch.Tensor):
        loss, source = output, "the model's output"
    elif isinstance(output, Mapping) and output.get("loss") is not None:
        loss, source = output["loss"], 'output["loss"]'
    elif getattr(output, "loss", None) is not None:
        loss, source = output.loss, "output.loss"
    else:
        raise LossError(
            f"no loss found: the model returned {_outline(output)}. Put the labels in the batch "
            "so that it computes one, or give loss_fn=lambda output, batch: ..."
        )
    if not isinstance(loss, torch.Tensor):
        raise LossError(f"{source} is a {type(loss).__name__}, not a tensor")
    if loss.dim() != 0 or not loss.is_floating_point():
        raise LossError(
            f"{source} has shape {list(loss.shape)} and dtype {loss.dtype}; the loss must be one "
            "floating-point number (shape []): reduce it, for example with .mean()"
            + ("" if loss_fn else ", in loss_fn=lambda output, batch: ...")
        )
    return loss


def _outline(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        return f"a tensor of shape {list(output.shape)}"
    if isinstance(output, Mapping):
        items = ", ".join(f"{k}: {_outline(v)}" for k, v in output.items())
        return f"{type(output).__name__}({items})"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__}({', '.join(_outline(v) for v in output)})"
    return type(output).__name__


def _listed(names: Any) -> str:
    return ", ".join(repr(str(name)) for name in names) or "nothing"

"""Buffers that forward replaces (``self.n = self.n + 1``): their new values are results."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ..ir.errors import CaptureError
from ..tensors.facts import described


@dataclass
class Replaced:
    """What forward has made of buffers.

    Attributes:
        values: buffer -> its value for the next call.
        lost: attribute that the next call cannot read -> why.
    """

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


@contextmanager
def replaced_buffers(module: nn.Module, attributes: Collection[str]) -> Iterator[Replaced]:
    """A forward inside; afterwards every buffer is the tensor that it was, and what is yielded has
    the values under which forward has left them.

    They are no updates in place: a backward may still read the tensor that was there.

    Args:
        attributes: buffers that are attributes in the user's model.

    Raises:
        CaptureError: what is there afterwards cannot be the next call's buffer.
    """
    before = list(_buffers(module))
    found = Replaced()
    yield found
    for part, name, attribute, old in before:
        new = getattr(part, attribute, None)
        if new is old:
            continue
        problem = _problem(old, new, shared=sum(other is old for *_, other in before) > 1)
        if isinstance(new, torch.Tensor) and not problem:
            found.values[name] = new.detach().clone()
        elif name in attributes:
            found.lost[name] = f"forward {problem}"
        else:
            raise CaptureError(f"buffer {name!r}: forward {problem}")
        part._buffers[attribute] = old


def _buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, torch.Tensor]]:
    for path, part in module.named_modules():
        for attribute, buffer in part._buffers.items():
            if buffer is not None:
                yield part, f"{path}.{attribute}".lstrip("."), attribute, buffer


def _problem(old: torch.Tensor, new: object, shared: bool) -> str:
    """Why a new value is none for the next call; "" if it is."""
    if not isinstance(new, torch.Tensor):
        return "takes it away: give it another value instead"
    if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
        return (
            f"replaces its {_on_device(old)} by {_on_device(new)}, which the next call would "
            "compute with: keep shape, dtype and device"
        )
    if new.requires_grad:
        return "gives it a value with a gradient, which the next call would need: .detach() it"
    if shared:
        return (
            "replaces it under one of its names, and the others keep the old tensor: update it in "
            "place, with .copy_()"
        )
    return ""


def _on_device(tensor: torch.Tensor) -> str:
    return f"{described(tensor.shape, tensor.dtype)} on {tensor.device}"

"""Tensors of the model that forward replaces: their new values are results.

It gives an attribute another tensor (``self.n = self.n + 1``), or a tensor another memory
(``param.data = ...``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..ir.errors import CaptureError
from ..tensors.facts import described
from ..tensors.pytree import tree_map

_DATA: Any = torch.Tensor.data


class Memories(TorchFunctionMode):
    """A forward inside, in which `.data` of a tensor is what `.detach()` gives, which tracing would
    take for a tensor from outside.

    A tensor that is given another memory (`tensor.data = other`) stands for that in all calls that
    follow; what was read of it before stays as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id; kept alive

    def of(self, value: Any) -> Any:
        """A tensor in the memory that it has now."""
        return self._given[id(value)][1] if id(value) in self._given else value

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        first, named = args[:1], kwargs or {}
        if self._given:
            args, named = tree_map(self.of, (args, named))
        if getattr(func, "__self__", None) is not _DATA:
            return func(*args, **named)
        if func.__name__ == "__get__":
            return args[0].detach()
        return self._give(first[0], args[1])

    def _give(self, tensor: torch.Tensor, other: torch.Tensor) -> None:
        if tensor.requires_grad:
            raise CaptureError(
                "forward gives a tensor that needs a gradient another memory (.data = ...): "
                "compute a new tensor; change weights after the optimizer's step"
            )
        self._given[id(tensor)] = tensor, other.detach()


@dataclass
class Replaced:
    """What forward has made of the model's tensors.

    Attributes:
        values: buffer, or parameter that has another memory -> its value for the next call.
        lost: attribute that the next call cannot read -> why.
    """

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


@contextmanager
def replaced_tensors(
    module: nn.Module, attributes: Collection[str], memories: Memories
) -> Iterator[Replaced]:
    """A forward inside; afterwards every buffer is the tensor that it was, and what is yielded has
    the values with which forward has left them.

    They are no updates in place: a backward may still read the tensor that was there.

    Args:
        attributes: buffers that are attributes in the user's model.
        memories: what forward has given tensors.

    Raises:
        CaptureError: what is there afterwards cannot be the next call's buffer.
    """
    before = list(_buffers(module))
    params = list(module.named_parameters())
    found = Replaced()
    yield found
    for part, name, attribute, old in before:
        new = memories.of(getattr(part, attribute, None))
        if new is old:
            continue
        shared = part._buffers[attribute] is not old  # under other names it is still the old one
        shared = shared and sum(other is old for *_, other in before) > 1
        problem = _problem(old, new, shared)
        if isinstance(new, torch.Tensor) and not problem:
            found.values[name] = new.detach().clone()
        elif name in attributes:
            found.lost[name] = f"forward {problem}"
        else:
            raise CaptureError(f"buffer {name!r}: forward {problem}")
        part._buffers[attribute] = old
    for name, old in params:
        new = memories.of(old)
        if new is not old:
            if problem := _problem(old, new, shared=False):
                raise CaptureError(f"parameter {name!r}: forward {problem}")
            found.values[name] = new.detach().clone()


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

"""Tensors that forward or the loss reads and that are none of the model's.

A graph has them as constants. That is right for a mask or the weights of classes, as long as nobody
changes them; what is trained, or is a part of the user's model, of which the pipeline has a copy,
would stay as it was when the graph was made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..ir.errors import CaptureError
from ..tensors.facts import described, memory_of
from ..tensors.fakes import is_fake

Originals = Mapping[str, "ref[torch.Tensor]"]
"""First name of each tensor in the user's own model that has values."""

NUMBERS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__")
}
"""What makes values of Python of a tensor."""


@dataclass(frozen=True)
class Read:
    """A tensor with values that was read.

    Attributes:
        by: forward or loss_fn.
        tensor: shares memory and version with the one that the user has.
        trained: whether it requires gradients.
        version: counts changes in place.
        numbers: whether Python has its values (``.item()``).
    """

    by: str
    tensor: torch.Tensor
    trained: bool
    version: int
    numbers: bool

    def __str__(self) -> str:
        return described(self.tensor.shape, self.tensor.dtype)

    def check(self) -> None:
        """Raises CaptureError if it has been changed since."""
        if _version(self.tensor) != self.version:
            raise CaptureError(
                f"{self.by} reads a tensor of {self} that is none of the model's and that "
                "has been changed in place since it was compiled, which the compiled graph would "
                "not follow: pass it in with the batch"
            )


class Reading(TorchFunctionMode):
    """A forward inside; notes the tensors with values that torch's functions are given.

    Attributes:
        by: who reads now.
        found: by id, who has read a tensor first, and its version then.
        numbers: ids of those that Python has got the values of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by = "forward"
        self.found: dict[int, tuple[str, torch.Tensor, int]] = {}
        self.numbers: set[int] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for tensor in _tensors((args, kwargs or {})):
            if _has_values(tensor):
                self.found.setdefault(id(tensor), (self.by, tensor, _version(tensor)))
                if func in NUMBERS:
                    self.numbers.add(id(tensor))
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> list[Read]:
        """What has been read; not while it is traced, which would trace this too."""
        return [
            Read(by, tensor.detach(), tensor.requires_grad, version, key in self.numbers)
            for key, (by, tensor, version) in self.found.items()
            if memory_of(tensor) is not None
        ]


def originals_of(named: Mapping[str, torch.Tensor]) -> Originals:
    """Of all names of a model's tensors, the first ones; held weakly, as the user may delete it."""
    first: dict[int, str] = {}
    for name, tensor in named.items():
        if not is_fake(tensor):
            first.setdefault(id(tensor), name)
    return {name: ref(named[name]) for name in first.values()}


def constants_of(
    constants: Collection[torch.Tensor],
    read: Sequence[Read],
    originals: Originals,
    updated: Collection[str],
) -> tuple[Read, ...]:
    """What a graph has read from outside and has as constants.

    Args:
        constants: of the graph.
        updated: the buffers that the graph updates.

    Raises:
        CaptureError: one of them is no constant.
    """
    memories = {memory_of(tensor) for tensor in constants}
    found = tuple(each for each in read if each.numbers or memory_of(each.tensor) in memories)
    held = [(n, tensor) for n, each in originals.items() if (tensor := each()) is not None]
    names = {memory_of(t): (n, t) for n, t in reversed(held)}
    for each in found:
        name, original = names.get(memory_of(each.tensor), ("", None))
        trained = isinstance(original, nn.Parameter)
        if name and (trained or name in updated):
            kind = "parameter" if trained else "buffer"
            raise CaptureError(
                f"{each.by} reads {kind} {name!r} of the model that compile() was given, of which "
                "the pipeline trains a copy, so it would see the old values in every step: "
                + _advice(each.by, "read it as an attribute of self")
            )
        if each.trained:
            raise CaptureError(
                f"{each.by} reads a tensor of {each} that requires gradients and is no "
                "parameter of the model, so it would be a constant: if it is one, set "
                "requires_grad_(False) on it; if not, "
                + _advice(each.by, "make it a parameter of a module of the model")
            )
    return found


def _advice(by: str, otherwise: str) -> str:
    if by == "forward":
        return otherwise
    return (
        "make loss_fn an nn.Module that has it, or compute what needs it in the model's forward "
        "and return it with the output; an L2 penalty may be the optimizer's weight_decay"
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether it is not one of those that stand for values while a graph is traced."""
    return type(tensor) is torch.Tensor or (
        isinstance(tensor, nn.Parameter) and not is_fake(tensor)
    )


def _version(tensor: torch.Tensor) -> int:
    """Tensors of `torch.inference_mode` count no changes."""
    return 0 if tensor.is_inference() else int(tensor._version)

"""Tensors with shapes and no data.

`FakeTensorMode` is torch's own stand-in for them. It has no public name; this file is its home.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def weightless() -> Iterator[None]:
    """Build models and batches inside this block without memory for their data."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextmanager
def with_data() -> Iterator[None]:
    """Inside `weightless`: what is made here has data."""
    with unset_fake_temporarily():
        yield


def meta_like(tensor: torch.Tensor) -> torch.Tensor:
    """The same layout on the meta device, also of a fake tensor: no data and no mode."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def on_memory(like: FakeTensor, memory: torch.UntypedStorage) -> FakeTensor:
    """A fake tensor of the same layout on other memory, or the same, that needs no gradient; made
    below all modes, which takes a third of the time."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        made = torch.empty(0, dtype=like.dtype, device="meta")
        made.set_(memory, like.storage_offset(), like.shape, like.stride())
        return FakeTensor(like.fake_mode, made, like.device)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether it has no data; nor has what a vmap that is over has left in a graph."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return isinstance(tensor, FakeTensor) or tensor.is_meta or wrapped


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def is_symbol(value: object) -> bool:
    """Whether it is a size, or follows from sizes, that is a symbol while a graph is traced."""
    return isinstance(value, _SYMBOLS)

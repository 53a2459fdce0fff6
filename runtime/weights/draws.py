"""Random draws that depend on what they are for, not on what was drawn before.

`TorchDispatchMode` is torch's hook below autograd; its module has no public name.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...compiler.ir.ops import mix, seeded
from ...compiler.memory.meter import storages_of

_RANDOM = ("bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal", "random")
_OVERWRITING = frozenset(f"{name}_" for name in (*_RANDOM, "uniform", "copy", "fill", "zero"))


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Seeds each random operator by a name and a count, while it is entered.

    The name is that of the tensor that is written, or that the operator's inputs were made from,
    else of the module that is being initialised: what a tensor gets does not depend on which
    others have data. Tensors are filled on the CPU, so they are the same on every device. The
    default generators are left in any state.

    Args:
        tensors: name -> tensor, of all that are initialised, with data or without.

    Attributes:
        written: name -> how many elements were set, without reading what was there.
    """

    def __init__(self, seed: int, tensors: Mapping[str, torch.Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        # Weak: a storage's Python object lives as long as it does.
        self._targets: WeakKeyDictionary[torch.UntypedStorage, str] = WeakKeyDictionary()
        for name, tensor in tensors.items():  # a shared one goes by the first of its names
            self._targets.setdefault(tensor.untyped_storage(), name)
        self._names = WeakKeyDictionary(self._targets)  # and of what is made from them
        self._module = ""
        self._counts: Counter[str] = Counter()
        self.written: Counter[str] = Counter()

    @contextmanager
    def inside(self, module: str) -> Iterator[None]:
        """What is drawn from nothing in this block is for a module."""
        before, self._module = self._module, module
        try:
            yield
        finally:
            self._module = before

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = next((self._names[s] for s in storages_of((args, kwargs)) if s in self._names), None)
        target = args[0] if _overwrites(func) else kwargs.get("out")
        if isinstance(target, torch.Tensor) and target.untyped_storage() in self._targets:
            self.written[self._targets[target.untyped_storage()]] += target.numel()
        if torch.Tag.nondeterministic_seeded in func.tags:
            result = self._draw(name or self._module, func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        if name is not None:
            for storage in storages_of(result):
                self._names.setdefault(storage, name)
        return result

    def _draw(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        site = mix(key, self._counts[name])
        self._counts[name] += 1
        if kwargs.get("generator") is not None:  # one whose state would depend on other draws
            kwargs = kwargs | {"generator": None}
        if _overwrites(func) and args[0].is_cuda:
            drawn = torch.empty_like(args[0], device="cpu")
            seeded(self._seed, site, func, drawn, *args[1:], **kwargs)
            return args[0].copy_(drawn)
        return seeded(self._seed, site, func, *args, **kwargs)


def _overwrites(func: Any) -> bool:
    return func.overloadpacket.__name__ in _OVERWRITING

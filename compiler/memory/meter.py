"""Counts the bytes of live tensors, storage by storage, as operators make and drop them.

`TorchDispatchMode` is torch's hook below autograd; its module has no public name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..tensors.pytree import tensors_in

Call = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_DEVICE = torch.ops.prim.device.default


class StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Live bytes of distinct storages, real or fake, while it is entered and after.

    A storage counts once, at its full size, from the operator that made it until the last tensor
    on it dies, whoever held it: Python, a view, or autograd. A storage that was there before
    counts only if `hold` was told of it. What an operator allocates for itself (a workspace) is
    not seen.

    Args:
        call: runs an operator: (operator, args, kwargs) -> result.

    Attributes:
        current_bytes: alive now.
        peak_bytes: the most that was alive at once since the start or `restart`.
    """

    def __init__(self, call: Call | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._call = call or _call
        self.current_bytes = 0
        self.peak_bytes = 0
        # A storage keeps its Python object for as long as it lives itself, so that the object's id
        # is the storage's, and a weak reference to it dies with the storage.
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sizes: dict[int, int] = {}  # of those that count

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made before, too."""
        for tensor in tensors:
            self._is_new(tensor.untyped_storage())
            self._count(tensor.untyped_storage())

    def restart(self) -> None:
        """Forget the peak: it is what is alive now."""
        self.peak_bytes = self.current_bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:  # which is asked of fake tensors more often than all else
            return self._call(func, args, kwargs)
        if func is not torch.ops.aten.lift_fresh.default:  # which gets what `torch.tensor` made
            for storage in storages_of((args, kwargs)):
                self._is_new(storage)
        result = self._call(func, args, kwargs)
        for storage in storages_of(result):
            if self._is_new(storage) or id(storage) in self._sizes:
                self._count(storage)
        return result

    def _is_new(self, storage: torch.UntypedStorage) -> bool:
        """Whether a storage is seen for the first time; from now on it is known."""
        key = id(storage)
        if key in self._known:
            return False
        self._known[key] = weakref.ref(storage, lambda _: self._drop(key))
        return True

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, or what an operator has added to its size."""
        key = id(storage)
        self.current_bytes += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def _drop(self, key: int) -> None:
        del self._known[key]
        self.current_bytes -= self._sizes.pop(key, 0)


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def storages_of(values: Any) -> list[torch.UntypedStorage]:
    """Of the tensors in a tree of values, in order."""
    found = tensors_in(values)
    parts = [(x._indices(), x._values()) if x.is_sparse else (x,) for x in found]
    return [each.untyped_storage() for part in parts for each in part]

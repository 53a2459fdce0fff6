"""The functions with `functools.lru_cache` of all modules, in which a trace may leave results.

There are thousands of modules, most of them of installed libraries, and a model is traced many
times: what was found in these is kept for as long as they hold the same things.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .code import is_foreign_module

_WITHOUT_TENSORS = {"_pytest", "hypothesis", "mpmath", "pygments", "pytest", "scipy", "sympy"}
"""Large libraries that know nothing of torch: their caches keep no tensors."""


@dataclass(frozen=True, eq=False, slots=True)
class _Seen:
    """A module, when it was last looked into.

    Attributes:
        held: all that it held.
        classes: the attributes of each class that is defined in it.
        sizes: the number of these.
        found: its functions with a cache.
    """

    module: types.ModuleType
    held: tuple[Any, ...]
    classes: tuple[types.MappingProxyType[str, Any], ...]
    sizes: int
    found: tuple[Any, ...]


_foreign: set[str] = set()
_installed: dict[str, _Seen] = {}


def caches() -> list[Any]:
    """The functions with `functools.lru_cache` in all modules but torch's, Python's own and those
    of some libraries that know nothing of torch."""
    found: list[Any] = []
    for name, module in list(sys.modules.items()):
        if name in _foreign:
            continue
        seen = _installed.get(name)
        if seen is None or seen.module is not module or _differs(seen):
            if is_foreign_module(name) or name.partition(".")[0] in _WITHOUT_TENSORS:
                _foreign.add(name)
                continue
            if not isinstance(module, types.ModuleType):
                continue
            seen = _look(name, module)
            if _is_installed(getattr(module, "__file__", None) or ""):
                _installed[name] = seen
        found += seen.found
    return found


def _look(name: str, module: types.ModuleType) -> _Seen:
    held = tuple(vars(module).values())
    kinds = [v for v in held if isinstance(v, type) and v.__module__ == name]
    classes = tuple(map(vars, kinds))
    every = (*held, *(value for inner in classes for value in inner.values()))
    found = (
        value
        for value in every
        if isinstance(value, functools._lru_cache_wrapper)
        and not is_foreign_module(getattr(value, "__module__", None))  # imported from there
    )
    return _Seen(module, held, classes, sum(map(len, classes)), tuple(found))


def _differs(seen: _Seen) -> bool:
    """Whether there is something else in a module than there was, or more in its classes."""
    now = vars(seen.module)
    if len(now) != len(seen.held) or sum(map(len, seen.classes)) != seen.sizes:
        return True
    return not all(map(operator.is_, now.values(), seen.held))


@functools.cache
def _is_installed(file: str) -> bool:
    """Unlike one that is being written, or a notebook, which are looked into each time."""
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)

"""Whether two submodules do the same: the same code on state that is equal where it is read.

``self.layer_idx`` differs from layer to layer. Whether forward reads it is seen where it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..effects.code import is_foreign

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
ALL = "*"  # of an attribute: they were looked at in some other way than by name
FEWEST = 3  # submodules that are worth it

Place = tuple[str, str]
"""A submodule's path below a layer, and the name of an attribute."""


class Mark:
    """A hook of ours that says where forward is; it changes nothing."""


def layers_of(root: nn.Module) -> dict[str, tuple[nn.Module, object]]:
    """Path -> submodule and what it has in common with at least `FEWEST` beside it: numbered ones
    of the same class with the same tensors; none that is inside of another."""
    found: dict[str, tuple[nn.Module, object]] = {}
    for path, part in root.named_modules():
        if any(f"{path}.".startswith(f"{outer}.") for outer in found):
            continue
        alike: dict[object, list[tuple[str, nn.Module]]] = {}
        for name, child in part.named_children():
            if name.isdecimal():
                alike.setdefault((path, _shape(child)), []).append((f"{path}.{name}", child))
        for key, layers in alike.items():
            if len(layers) >= FEWEST:
                found |= {name.lstrip("."): (layer, key) for name, layer in layers}
    return found


def _shape(part: nn.Module) -> object:
    kinds = tuple((name, type(each)) for name, each in part.named_modules())
    named = (*part.named_parameters(), *part.named_buffers())
    return kinds, tuple((name, layout(tensor)) for name, tensor in named)


def layout(tensor: torch.Tensor) -> tuple[object, ...]:
    """What operators see of a tensor, but for its values."""
    place = tensor.dtype, tensor.device, tensor.layout, tensor.is_leaf
    sizes = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
    return type(tensor), *sizes, *place, tensor.requires_grad, tensor.is_conj(), tensor.is_neg()


def differences(one: nn.Module, other: nn.Module) -> set[Place] | None:
    """Where the attributes of two submodules, and of all below them, have other plain values; None
    where more than that differs."""
    parts, others = (list(each.named_modules(remove_duplicate=False)) for each in (one, other))
    if [path for path, _ in parts] != [path for path, _ in others]:
        return None
    twins: dict[int, int] = {}
    for (_, a), (_, b) in zip(parts, others, strict=True):
        if type(a) is not type(b) or twins.setdefault(id(a), id(b)) != id(b):
            return None
    found: set[Place] = set()
    for (path, a), (_, b) in zip(parts, others, strict=True):
        mine, theirs = vars(a), vars(b)
        if list(mine) != list(theirs):
            return None
        for name, value in mine.items():
            if name.endswith("hooks"):
                alike = not (_hooks(value) or _hooks(theirs[name]))
            else:
                alike = _alike(value, theirs[name], twins)
            if not alike and _is_plain(value, theirs[name]):
                found.add((path, name))
            elif not alike:
                return None
    return found


def _hooks(value: Any) -> list[Any]:
    each = value.values() if isinstance(value, dict) else [value]
    return [hook for hook in each if not isinstance(hook, Mark)]


def _is_plain(value: object, other: object) -> bool:
    return type(value) is type(other) and type(value) in PLAIN


def _alike(value: Any, other: Any, twins: dict[int, int]) -> bool:
    """Args:
    twins: ids of modules and tensors of the one -> those in the same places of the other.
    """
    if isinstance(value, Calls) and isinstance(other, Calls):
        return True
    if isinstance(value, (nn.Module, torch.Tensor)) and value is not other:
        if id(value) not in twins and isinstance(value, torch.Tensor):
            if not isinstance(other, torch.Tensor) or layout(value) != layout(other):
                return False
            twins[id(value)] = id(other)
        return twins.get(id(value)) == id(other)
    if value is other:
        same = isinstance(value, (nn.Module, torch.Tensor))  # shared, in the same places
        return not same or twins.setdefault(id(value), id(value)) == id(value)
    if type(value) is not type(other):
        return False
    if isinstance(value, dict):
        return list(value) == list(other) and all(
            _alike(value[key], other[key], twins) for key in value
        )
    if isinstance(value, (list, tuple)):
        pairs = zip(value, other, strict=False)
        return len(value) == len(other) and all(_alike(a, b, twins) for a, b in pairs)
    if isinstance(value, (set, frozenset)):
        return bool(value == other) and all(type(each) in PLAIN for each in value)
    return type(value) in PLAIN and bool(value == other) and repr(value) == repr(other)  # -0.0


class Calls:
    """Stands for a layer's own forward while a model is traced."""


# -- what is read ---------------------------------------------------------------------------------


@contextmanager
def noting_reads(
    layer: nn.Module, instead: Mapping[Place, object] = MappingProxyType({})
) -> Iterator[set[Place]]:
    """A call of a layer inside; yields the attributes that are read of it and of all below it.

    Args:
        instead: what is read of some of them, of which no note is made.

    Raises:
        TypeError: a class has its own way to read attributes.
    """
    paths = {id(part): path for path, part in layer.named_modules()}
    found: set[Place] = set()
    kinds = list(dict.fromkeys(type(part) for part in layer.modules()))
    own = [kind.__name__ for kind in kinds if {"__getattribute__", "__hash__"} & vars(kind).keys()]
    if own:
        raise TypeError(f"{own[0]} has its own way to read attributes")
    try:
        for kind in kinds:
            _watch(kind, paths, found, instead)
        yield found
    finally:
        for kind in kinds:
            for name in ("__getattribute__", "__hash__"):
                if name in vars(kind):
                    delattr(kind, name)


def _watch(
    kind: Any, paths: Mapping[int, str], found: set[Place], instead: Mapping[Place, object]
) -> None:
    get, hashed = kind.__getattribute__, kind.__hash__

    def read(part: nn.Module, name: str) -> Any:
        path = paths.get(id(part))
        if path is not None:
            if (path, name) in instead:
                return instead[path, name]
            if name != "__dict__":
                found.add((path, name))
            elif sys._getframe(1).f_code.co_filename != nn.modules.module.__file__:
                found.add((path, ALL))
        return get(part, name)

    def looked_up(part: nn.Module) -> int:
        if id(part) in paths and not is_foreign(sys._getframe(1).f_code.co_filename):
            found.add((paths[id(part)], ALL))
        return int(hashed(part))

    kind.__getattribute__, kind.__hash__ = read, looked_up

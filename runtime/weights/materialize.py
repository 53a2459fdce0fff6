"""Where a model's values come from, and only those that this process holds.

skeleton (shapes, strides, dtypes)  ->  an allocation per tensor, or for this process's rows of it
Source                              ->  fills them, one after the other: there is no second copy
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn

from ...compiler.capture.skeleton import Skeleton, named_state
from ...compiler.tensors.fakes import is_fake, meta_like
from .allocation import Allocation, Cut
from .initializers import Initializers
from .weight_files import WeightFiles


class Source(Protocol):
    """Values of parameters and buffers, each under the first of its names."""

    def has(self, name: str) -> bool: ...

    def fill(self, allocations: Mapping[str, Allocation]) -> None:
        """Give every allocation its tensor. At most a few are whole at once where rows are wanted.

        Raises:
            StateError: there is none for one of them.
        """
        ...


class LiveWeights:
    """The tensors of the user's model that have data."""

    def __init__(self, model: nn.Module, skeleton: Skeleton):
        state = ((skeleton.canonical[name], tensor) for name, tensor in named_state(model))
        self._tensors = {name: tensor.detach() for name, tensor in state if not is_fake(tensor)}

    def has(self, name: str) -> bool:
        return name in self._tensors

    def fill(self, allocations: Mapping[str, Allocation]) -> None:
        for name, allocation in allocations.items():
            allocation.take(self._tensors[name])


class FirstOf:
    """Several sources: each tensor comes from the first that has it."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources

    def has(self, name: str) -> bool:
        return any(source.has(name) for source in self._sources)

    def fill(self, allocations: Mapping[str, Allocation]) -> None:
        rest = dict(allocations)
        for source in self._sources:
            chosen = {name: rest.pop(name) for name in tuple(rest) if source.has(name)}
            if chosen:
                source.fill(chosen)


def source_of(
    model: nn.Module, skeleton: Skeleton, weights: str | Path | None, seed: int, warn: bool
) -> Source:
    """Files where they are given, then what the model holds, then its own initialisers.

    Args:
        warn: say so where the files have more than the model.

    Raises:
        StateError: the files do not fit the model.
    """
    sources: list[Source] = [LiveWeights(model, skeleton), Initializers(model, skeleton, seed)]
    if weights is not None:
        files = WeightFiles(weights, skeleton)
        if warn and files.unexpected:
            some = ", ".join(map(repr, sorted(files.unexpected)[:5]))
            warnings.warn(
                f"{files.path} has {len(files.unexpected)} tensors that the model does not, and "
                f"which are left out: {some}",
                stacklevel=2,
            )
        sources.insert(0, files)
    return FirstOf(sources)


@torch.no_grad()
def materialize(
    source: Source,
    skeleton: Skeleton,
    names: Mapping[torch.device, Collection[str]],
    cuts: Mapping[str, Cut] = MappingProxyType({}),
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> dict[str, Allocation]:
    """Allocations with the source's values, in the model's layouts.

    Args:
        names: device -> first names of the tensors that are wanted there.
        cuts: name -> what is kept of it, of those that are not kept whole.
        dtypes: name -> in what it is held, of those that are held in another than the model's.

    Raises:
        StateError: the source has none for one of them.
    """
    like = dict(named_state(skeleton.module))
    devices: dict[str, list[torch.device]] = defaultdict(list)
    for device, wanted in names.items():
        for name in wanted:
            devices[name].append(device)
    allocations = {
        name: Allocation(meta_like(like[name]).to(dtypes.get(name)), where, cuts.get(name))
        for name, where in devices.items()
    }
    source.fill(allocations)
    return allocations

"""The sizes that batches may have, where they are given (``dynamic=``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..capture.batch import BatchSpec
from ..ir.errors import BatchError, OptionError

Ranges = Mapping[str, Mapping[int, tuple[int, int]]]
"""Leaf of a batch -> its dimension -> the least and the largest size."""

HOWS = ("auto", "off")


def check_dynamic(name: str, value: Any) -> None:
    """Raises OptionError for what is neither a way nor ranges."""
    if value in HOWS if isinstance(value, str) else _are_ranges(value):
        return
    raise OptionError(
        f'{name}={value!r}: give "auto", "off", or ranges of sizes by leaf and dimension, such as '
        '{"input_ids": {1: (8, 2048)}}; rows, in dimension 0, need none'
    )


def _are_ranges(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(leaf, str) and isinstance(dims, Mapping) and all(map(_is_range, dims.items()))
        for leaf, dims in value.items()
    )


def _is_range(item: tuple[Any, Any]) -> bool:
    dim, sizes = item
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2:
        return False
    whole = all(type(number) is int for number in (dim, *sizes))
    return whole and dim >= 1 and 1 <= sizes[0] <= sizes[1]


def ranges_of(dynamic: Any) -> Ranges:
    return {} if isinstance(dynamic, str) else dynamic


def check_sizes(spec: BatchSpec, ranges: Ranges) -> None:
    """Raises BatchError where a batch has another size than it may, or lacks a leaf with one."""
    shapes = {leaf.name: leaf.shape for leaf in spec.leaves}
    for name, dims in ranges.items():
        for dim, (least, most) in dims.items():
            shape = shapes.get(name, ())
            if dim >= len(shape):
                raise BatchError(
                    f"dynamic= has sizes of {name!r} in dimension {dim}, which the batch ({spec}) "
                    "does not have"
                )
            if not least <= shape[dim] <= most:
                raise BatchError(
                    f"the batch's {name!r} has size {shape[dim]} in dimension {dim}, and dynamic= "
                    f"says {least} to {most}"
                )


def largest(spec: BatchSpec, ranges: Ranges) -> BatchSpec:
    """With the largest sizes; sizes of other leaves that are the same in the example follow."""
    sizes = {leaf.name: leaf.shape for leaf in spec.leaves}
    most = {
        (dim, sizes[name][dim]): limit
        for name, dims in ranges.items()
        for dim, (_, limit) in dims.items()
    }
    leaves = []
    for leaf in spec.leaves:
        mine = ranges.get(leaf.name, {})
        shape = tuple(
            mine[d][1] if d in mine else most.get((d, n), n) if d else n
            for d, n in enumerate(leaf.shape)
        )
        leaves.append(replace(leaf, shape=shape))
    return replace(spec, leaves=tuple(leaves))


def stretched(values: Sequence[torch.Tensor], most: BatchSpec) -> tuple[torch.Tensor, ...]:
    """The leaves of a batch at other sizes: fewer of it, or what is last repeated."""
    made = []
    for value, leaf in zip(values, most.leaves, strict=True):
        for dim, (old, new) in enumerate(zip(tuple(value.shape), leaf.shape, strict=True)):
            if old != new:
                places = torch.arange(new, device=value.device).clamp_(max=old - 1)
                value = value.index_select(dim, places)
        made.append(value)
    return tuple(made)

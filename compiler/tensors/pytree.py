"""Structures of tensors, taken apart and put together again.

`torch.utils._pytree` knows those that users register with torch, dataclasses of transformers among
them. It has no public name; this file is its home.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.export
from torch.utils._pytree import SUPPORTED_NODES
from torch.utils._pytree import TreeSpec as TreeSpec
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_flatten_with_path as tree_flatten_with_path
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten
from torch.utils._pytree import treespec_dumps as treespec_dumps
from torch.utils._pytree import treespec_loads as treespec_loads


def is_known(value: Any) -> bool:
    """Whether it is a structure, and no leaf."""
    return type(value) in SUPPORTED_NODES


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """As `tree_leaves` lists them, which takes longer for what operators are given."""
    if type(values) in (tuple, list):
        for each in values:
            yield from tensors_in(each)
    elif isinstance(values, torch.Tensor):
        yield values
    elif type(values) is dict:
        for each in values.values():
            yield from tensors_in(each)
    elif type(values) not in _PLAIN:
        yield from (x for x in tree_leaves(values) if isinstance(x, torch.Tensor))


def register_dataclass(kind: type) -> None:
    """Let a dataclass be a structure."""
    if kind not in SUPPORTED_NODES:
        torch.export.register_dataclass(kind)

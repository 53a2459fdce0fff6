"""Structures of tensors, taken apart and put together again.

`torch.utils._pytree` knows those that users register with torch, dataclasses of transformers among
them. It has no public name; this file is its home.
"""

from __future__ import annotations

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


def register_dataclass(kind: type) -> None:
    """Let a dataclass be a structure."""
    if kind not in SUPPORTED_NODES:
        torch.export.register_dataclass(kind)

"""What code may find out about its process, which no hash of it has.

Code of installed libraries is taken to ask for nothing that would make another graph.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch

from ..effects.code import is_foreign_module

_LOOKS_UP = ("globals", "locals", "eval", "exec", "__import__", "import_module")
_ASKS: dict[str, Callable[[], Any]] = {
    "initial_seed": torch.initial_seed,
    "get_num_threads": torch.get_num_threads,
    "get_num_interop_threads": torch.get_num_interop_threads,
    "device_count": torch.accelerator.device_count,
    "cpu_count": os.cpu_count,
    "getcwd": os.getcwd,
    "getpid": os.getpid,
    "get_rank": lambda: os.environ.get("RANK"),
    "get_world_size": lambda: os.environ.get("WORLD_SIZE"),
}
"""What code may ask of the process, and the answer."""


class UntoldError(Exception):
    """A value of which two that differ may look alike."""


def asked_by(function: FunctionType, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """What code asks of the process, and the answers.

    Args:
        names: that it names.

    Raises:
        UntoldError: it looks names up that stand nowhere.
    """
    space = function.__globals__
    if _is_installed(space):
        return
    for name in names:
        if name in _LOOKS_UP and name not in space:
            raise UntoldError(f"what {function.__qualname__} finds with {name}")
        if name in _ASKS:
            yield name, _ASKS[name]()
    if space.get("sys") is sys and "modules" in names:
        raise UntoldError(f"what {function.__qualname__} finds in sys.modules")


def check_cache(function: Any) -> None:
    """Raises UntoldError for one that knows results already, of whatever they were made."""
    space = getattr(function.__wrapped__, "__globals__", {})
    library = _is_installed(space) or is_foreign_module(function.__module__ or "")
    if function.cache_info().currsize and not library:
        raise UntoldError(f"what {function.__qualname__} has in its cache")


def _is_installed(space: Mapping[str, Any]) -> bool:
    """Whether a file's globals are those of a library, which its version tells."""
    parts = str(space.get("__file__") or "").replace(os.sep, "/").split("/")
    return "site-packages" in parts or "dist-packages" in parts

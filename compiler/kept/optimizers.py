"""The folder of what optimizers take, which two of their steps tell: as long as all the rest of a
second run's compilation."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..memory.optimizer_cost import Factory, OptimizerMemory, on_cuda, optimizer_memory
from ..tensors.facts import layout_of
from .folder import drop_oldest, write
from .identity import UntoldError, identity_of
from .surroundings import versions

MOST_BYTES = 1 << 26  # of all files


class Optimizers:
    """Args:
    path: of the folder, which is made when something is written; None where nothing is kept.
    """

    def __init__(self, path: Path | None):
        self._path = path

    def memory(
        self, factory: Factory, params: Mapping[str, torch.Tensor], kind: str = "cpu"
    ) -> OptimizerMemory:
        """See `optimizer_memory`.

        Args:
            kind: the type of device that is planned for.
        """
        if kind == "cuda":
            params = on_cuda(params)
        path = self._place(factory, params)
        if path is None:
            return optimizer_memory(factory, params)
        with contextlib.suppress(OSError, ValueError, TypeError):
            return OptimizerMemory(**json.loads(path.read_text()))
        found = optimizer_memory(factory, params)
        with contextlib.suppress(OSError):
            write(path, json.dumps(vars(found)).encode())
            drop_oldest(path.parent, "*.json", MOST_BYTES)
        return found

    def _place(self, factory: Factory, params: Mapping[str, torch.Tensor]) -> Path | None:
        if self._path is None:
            return None
        layouts = [(name, *layout_of(param)) for name, param in params.items()]
        try:
            told = versions(), identity_of(factory), layouts
        except UntoldError:
            return None
        return self._path / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:40]}.json"

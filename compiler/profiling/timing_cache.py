"""Measured seconds on disk, one file per device, so that a second run need not measure again.

A file holds for one (device, threads, processes, torch version, backend). Processes may write it
at once: each write replaces the whole file and keeps what others had added; at worst something is
measured twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from ..costs.at_hand import device_name

VERSION = 1  # of the format, and of how programs are hashed and timed
MOST_S = 3600.0  # that a program of one microbatch takes


class TimingCache:
    """Program hash -> seconds.

    Args:
        folder: where the file is; None keeps the times in this process only.
        beside: processes that run on this machine at once; they share caches and memory.
        backend: who runs the programs.
    """

    def __init__(
        self, device: torch.device, folder: Path | None, beside: int = 1, backend: str = "eager"
    ):
        self._header: dict[str, object] = {
            "version": VERSION,
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "processes": beside,
            "torch": torch.__version__,
        }
        if backend != "eager":
            self._header["backend"] = backend
        name = "-".join(re.sub(r"[^\w.]+", "_", str(part)) for part in self._header.values())
        self.name = f"times-{name}.json"
        self.path = None if folder is None else folder / self.name
        self.seconds = self._load()

    def _load(self) -> dict[str, float]:
        """What the file says; nothing if it is missing, damaged or of another kind. A time that is
        none is left out, so that it is measured again, and gone with the next write."""
        if self.path is None:
            return {}
        try:
            found = json.loads(self.path.read_text()) if self.path.is_file() else {}
            if {key: found[key] for key in self._header} != self._header:
                return {}
            return {key: float(value) for key, value in found["seconds"].items() if _is_time(value)}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}

    def add(self, seconds: Mapping[str, float]) -> bool:
        """Keep new times; whether they are on disk (a folder may be read-only)."""
        self.seconds |= seconds
        if self.path is None:
            return False
        self.seconds = self._load() | self.seconds
        text = json.dumps({**self._header, "seconds": self.seconds}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".times-")
        except OSError:
            return False
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            Path(name).replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            return False
        return True


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 <= cast(float, value) <= MOST_S  # NaN is not

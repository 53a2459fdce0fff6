"""The folder of graphs that were captured: one safetensors file each.

Processes may use it at once: a file is written beside its place and then put there whole. One that
is damaged, or of a version that wrote others, is no file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..capture.capture import Captured
from ..tensors.fakes import FakeTensorMode
from .attributes import Change
from .captures import capture_in, capture_of
from .graphs import value_in, value_of

MOST_BYTES = 1 << 30  # of all files; those that were used last are left
_SUFFIX = ".safetensors"
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Heard:
    """A warning that tracing gave."""

    kind: type[Warning]
    text: str
    file: str
    line: int

    def repeat(self, once: dict[Any, Any]) -> None:
        """Give it, in the same place."""
        warnings.warn_explicit(self.text, self.kind, self.file, self.line, registry=once)


@dataclass(frozen=True)
class Entry:
    """What a file has.

    Attributes:
        records: what passes over the exported graph have done, field by field.
        heard: warnings.
        changes: attributes that forward has set.
    """

    captured: Captured
    records: tuple[tuple[Any, ...], ...]
    heard: tuple[Heard, ...]
    changes: tuple[Change, ...] = ()


class Folder:
    """Args:
    path: is made when something is written.
    """

    def __init__(self, path: Path):
        self.path = path

    def find(self, key: str, batch: Sequence[torch.Tensor], mode: FakeTensorMode) -> Entry | None:
        """What was captured under a key, and for the answers that a batch gives.

        Args:
            key: a hash of all that it depends on but these.
            mode: of the tensors in it that have no values.
        """
        for path in sorted(self.path.glob(f"{key}-*{_SUFFIX}")):
            try:
                entry = _read(path, mode)
            except OSError:  # another user's, or gone
                continue
            except _DAMAGED:
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            guards = entry.captured.guards
            if not guards or (batch and guards.difference(batch) is None):
                with contextlib.suppress(OSError):
                    os.utime(path)
                return entry
        return None

    def add(self, key: str, entry: Entry) -> None:
        """Keep it, if the folder can be written.

        Raises:
            UntoldError: it has what no file has.
        """
        told, tensors = capture_in(entry.captured)
        heard = [[each.kind.__name__, each.text, each.file, each.line] for each in entry.heard]
        changes = [[*each.place, each.name, value_in(each.new)] for each in entry.changes]
        whole = {"captured": told, "records": entry.records, "heard": heard, "changes": changes}
        text = json.dumps(whole)
        data = save(tensors, {"pipecompile": text})
        answers = hashlib.sha256(repr(entry.captured.guards.heard).encode()).hexdigest()[:16]
        with contextlib.suppress(OSError):
            write(self.path / f"{key}-{answers}{_SUFFIX}", data)
            drop_oldest(self.path, f"*{_SUFFIX}", MOST_BYTES)


def write(path: Path, data: bytes) -> None:
    """A file, whole or not at all; others may write it at once.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def drop_oldest(folder: Path, pattern: str, most_bytes: int) -> None:
    """Of the files of a folder those that were used last are left."""
    files = [(path, path.stat()) for path in folder.glob(pattern)]
    total = sum(stat.st_size for _, stat in files)
    for path, stat in sorted(files, key=lambda each: each[1].st_mtime):
        if total <= most_bytes:
            return
        path.unlink(missing_ok=True)
        total -= stat.st_size


def _read(path: Path, mode: FakeTensorMode) -> Entry:
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["pipecompile"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    heard = (Heard(_KINDS.get(kind, UserWarning), *rest) for kind, *rest in told["heard"])
    captured = capture_of(told["captured"], tensors, mode)
    changes = (Change((m, inner), name, value_of(v)) for m, inner, name, v in told["changes"])
    return Entry(captured, tuple(map(tuple, told["records"])), tuple(heard), tuple(changes))


_KINDS: dict[str, type[Warning]] = {
    each.__name__: each for each in (UserWarning, FutureWarning, DeprecationWarning, RuntimeWarning)
}

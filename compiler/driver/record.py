"""Passes leave a record, and on request a readable dump."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PassRecord:
    """What one pass did; the note is what `inspect` shows."""

    name: str
    seconds: float
    note: str


class Recorder:
    """Collects the records of one compilation and writes the dumps.

    Args:
        folder: where dumps go; None for none.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.records: list[PassRecord] = []

    @contextmanager
    def record(self, name: str) -> Iterator[Outcome]:
        """Time a pass; the body fills in the outcome."""
        outcome = Outcome()
        start = time.perf_counter()
        yield outcome
        seconds = time.perf_counter() - start
        number = len(self.records)
        self.records.append(PassRecord(name, seconds, outcome.note))
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        header = f"# {name}: {outcome.note} ({seconds:.2f} s)\n"
        for suffix, text in outcome.texts.items():
            (self.folder / f"{number:03d}_{name}{suffix}").write_text(header + text())


class Outcome:
    """What a pass reports: a one-line note, and what makes its dumps, by file name suffix."""

    def __init__(self) -> None:
        self.note = ""
        self.texts: dict[str, Callable[[], str]] = {}

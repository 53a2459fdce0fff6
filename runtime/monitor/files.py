"""Numbers of steps and evaluations in a file: CSV, or JSON by lines."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ...compiler.ir.errors import OptionError
from .callbacks import Logger
from .metrics import NUMBERS


class _File(Logger):
    """Lines at the end of a file, each written at once: what a run leaves that is killed is whole.

    Args:
        path: its folder is made; a file that is there is continued, as resumed runs do.
        every: of so many steps one is written.
    """

    def __init__(self, path: str | Path, every: int = 1):
        super().__init__(every)
        self.path = Path(path)
        self._file: IO[str] | None = None

    def on_start(self, pipe: Any) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", newline="")
        except OSError as error:
            raise OptionError(
                f"{type(self).__name__}({str(self.path)!r}) cannot be written: {error}"
            ) from error

    def _line(self, text: str) -> None:
        assert self._file is not None, "on_start has opened it"
        self._file.write(text)
        self._file.flush()


class JSONL(_File):
    """A JSON object per line: ``{"step": 3, "kind": "train", "loss": 2.25, ...}``; numbers that are
    not known are left out, and what is not finite is null, as JSON has no such numbers."""

    def write(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        finite = {n: v if math.isfinite(v) else None for n, v in numbers.items()}
        self._line(json.dumps({"step": step, "kind": kind} | finite) + "\n")


class CSV(_File):
    """A table with a row per step, under one header; what is not known is empty.

    An evaluation is a row too. Its ``loss`` stands under that name, and its other results, which
    the header cannot foresee, must be named: ``CSV("run.csv", metrics=["accuracy"])``.

    Args:
        metrics: names of results of evaluations, for columns of their own.
    """

    def __init__(self, path: str | Path, every: int = 1, metrics: tuple[str, ...] | list[str] = ()):
        super().__init__(path, every)
        if isinstance(metrics, str):
            raise OptionError(f"CSV(metrics={metrics!r}): give a list of names")
        self._columns = ("step", "kind", *NUMBERS, *(n for n in metrics if n not in NUMBERS))

    def on_start(self, pipe: Any) -> None:
        super().on_start(pipe)
        header = _row(self._columns)
        with self.path.open(encoding="utf-8", newline="") as there:
            first = there.readline()
        if not first:
            self._line(header)
        elif first != header:
            raise OptionError(
                f"CSV({str(self.path)!r}): the file that is there has other columns "
                f"({first.strip()}): give another path, or the metrics= that it was begun with"
            )

    def write(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        unknown = [name for name in numbers if name not in self._columns]
        if unknown:
            raise OptionError(
                f"CSV({str(self.path)!r}) has no column for {unknown[0]!r}: give "
                f"CSV(..., metrics={unknown!r}) when it begins, or use JSONL, which needs none"
            )
        values = {"step": step, "kind": kind} | dict(numbers)
        self._line(_row([values.get(name, "") for name in self._columns]))


def _row(values: Any) -> str:
    made = io.StringIO()
    csv.writer(made, lineterminator="\n").writerow(values)
    return made.getvalue()

"""What passes leave behind: a record each, and on request readable dumps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..ir.errors import OptionError
from ..ir.program import PipelineProgram, fusions_of

Texts = Mapping[str, Callable[[], str]]
"""What makes a pass's dumps, by file name suffix."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        level: what it worked on.
        note: in one line; "" for nothing to say.
        told: whether the note stands in the plan.
    """

    level: str
    name: str
    seconds: float
    note: str
    told: bool = True


@dataclass
class Outcome:
    """What a pass reports while it runs."""

    note: str = ""
    texts: dict[str, Callable[[], str]] = field(default_factory=dict)


def prepare(folder: str | Path | None) -> None:
    """Make the folder of the dumps, if there is to be one.

    Raises:
        OptionError: nothing can be written there.
    """
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(
            f"dump_dir={str(folder)!r} cannot be written ({error.strerror}): give another folder"
        ) from error


class Recorder:
    """Collects the records of one compilation and writes the dumps.

    Args:
        folder: where dumps go; None for none.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.records: list[PassRecord] = []

    @contextmanager
    def record(self, level: str, name: str, told: bool = True) -> Iterator[Outcome]:
        """Time a pass; the body fills in the outcome."""
        outcome = Outcome()
        start = time.perf_counter()
        yield outcome
        seconds = time.perf_counter() - start
        number = sum(record.level != "forward" for record in self.records)
        self.records.append(PassRecord(level, name, seconds, outcome.note, told))
        if self.folder is None or not outcome.texts:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        header = f"# {name}: {outcome.note} ({seconds:.2f} s)\n"
        for suffix, text in outcome.texts.items():
            (self.folder / f"{number:03d}_{name}{suffix}").write_text(header + text())


def texts_of(program: PipelineProgram) -> Texts:
    """The programs of all stages, and the fusions that they call."""
    texts: dict[str, Callable[[], str]] = {}
    for stage in program.stages:
        parts = {"constants": stage.constants, "forward": stage.forward}
        parts |= {"backward": stage.backward} if stage.backward else {}
        parts |= {"weight": stage.weight} if stage.weight else {}
        for name, part in parts.items():
            texts[f"_stage{stage.stage}_{name}.py"] = part.text
            for fusion, module in fusions_of(part).items():
                texts[f"_{fusion}.py"] = partial(_code, module)
    return texts


def _code(module: Any) -> str:
    return str(module.code).strip() + "\n"

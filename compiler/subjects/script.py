"""A training script -> what it asks `compile` for: model, options and batch.

The script runs in this process as ``python train.py ARGUMENTS`` would, up to its first call of
`compile`, or, where that is given no ``example_batch``, up to the first batch that is to be trained
on. It trains nothing.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ...runtime.monitor.watching import Reached, watching
from ..driver.auto import Open
from ..ir.errors import OptionError, PipecompileError, SpecError
from ..options.arguments import Arguments
from .spec import Subject, explained


@dataclass(frozen=True)
class Script:
    """What a script has asked for.

    Attributes:
        subject: its model, the batch of all replicas, and the loss.
        open: what it leaves open.
    """

    subject: Subject
    arguments: Arguments
    open: Open


def is_script(spec: str) -> bool:
    """Whether SPEC is a file that is run, and not a function in one."""
    return spec.endswith(".py")


def run_script(path: Path, arguments: Sequence[str]) -> Script:
    """Run a script until it would train.

    Args:
        arguments: of its own command line.

    Raises:
        SpecError: there is no such file, it fails, or it ends without compiling or training.
        OptionError: it cuts batches itself.
    """
    if not path.is_file():
        raise SpecError(f"there is no file {str(path)!r}")
    before = sys.argv, list(sys.path)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        with ExitStack() as stack:
            watch = stack.enter_context(watching())
            stack.enter_context(explained(path, "running it", passed=PipecompileError))
            runpy.run_path(str(path), run_name="__main__")
    except Reached as reached:
        return _asked(path, reached)
    finally:
        sys.argv, sys.path[:] = before
    what = "ran its pipeline on no batch" if watch.asked else "called pipecompile.compile nowhere"
    raise SpecError(
        f"{path} ended and {what}: give it the arguments with which it trains after --, as in "
        f"pipecompile inspect {path} -- --layers 2, or name a function: {path}:build"
    )


def _asked(path: Path, reached: Reached) -> Script:
    asked = reached.asked.arguments
    if asked.cut is not None:
        raise OptionError(f"{path} gives cut=, and plans are made for rows: inspect a function")
    subject = Subject(asked.model, reached.batch, asked.loss_fn)
    return Script(subject, asked, reached.asked.open)

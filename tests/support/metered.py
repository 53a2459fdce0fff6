"""Steps with and without metrics, callbacks and gathering, of one pipeline in one process each."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pipecompile
from pipecompile import callbacks
from pipecompile.runtime import session
from pipecompile.runtime.executor import Job
from pipecompile.runtime.monitor.meter import Meter

from support import rivals

STEPS = 2  # of a turn


class Terminal(io.StringIO):
    """Takes the live line."""

    def isatty(self) -> bool:
        return True


@cache
def pipeline() -> Any:
    return pipecompile.compile(
        rivals.model(),
        2,
        microbatches=rivals.MICROBATCHES,
        optimizer=rivals.ADAMW,
        max_grad_norm=1.0,
        hardware="cpu",
        example_batch=rivals.batch(),
    )


def nothing(*_: object) -> tuple[()]:
    """No time, no report."""
    return ()


@contextlib.contextmanager
def nothing_measured() -> Iterator[None]:
    """As it would be without metrics: nothing is timed, counted or reported."""
    with contextlib.ExitStack() as stack:
        for name in ("begin", "ran", "scaled", "clipped"):
            stack.enter_context(mock.patch.object(Meter, name, nothing))
        stack.enter_context(mock.patch.object(Job, "called", nothing))
        stack.enter_context(mock.patch.object(session, "report_of", nothing))
        stack.enter_context(mock.patch.object(pipecompile.Pipeline, "end_step", nothing))
        yield


@cache
def logging() -> dict[str, list[Any]]:
    folder = Path(tempfile.mkdtemp())
    return {
        "CSV and JSONL": [callbacks.CSV(folder / "a.csv"), callbacks.JSONL(folder / "a.jsonl")],
        "live line": [callbacks.Console(total=10**6, file=Terminal())],
    }


def training(way: str) -> float:
    """Seconds of a step."""
    pipe, batch = pipeline(), rivals.batch()
    pipe.callbacks[:] = logging().get(way, [])
    with nothing_measured() if way == "nothing measured" else contextlib.nullcontext():
        return timed(lambda: pipe.step(batch))


def right(output: Any, batch: Any) -> Any:
    return output.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]


def evaluating(way: str) -> float:
    """Seconds of one evaluation of a batch."""
    pipe, batch = pipeline(), rivals.batch()
    acts: dict[str, Callable[[], Any]] = {
        "evaluate": lambda: pipe.evaluate(iter([batch])),
        "evaluate(metrics=accuracy)": lambda: pipe.evaluate(
            iter([batch]), metrics={"accuracy": right}
        ),
        "forward": lambda: pipe.forward(batch),
        'forward(gather="main")': lambda: pipe.forward(batch, gather="main"),
        'forward(gather="all")': lambda: pipe.forward(batch, gather="all"),
        "predict(fn=argmax)": lambda: pipe.predict(
            batch, lambda output, _: output.logits.argmax(-1)
        ),
    }
    return timed(acts[way])


def timed(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        act()
    return (time.perf_counter() - start) / STEPS

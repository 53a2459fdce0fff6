"""Who is told of steps, evaluations and saves, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...compiler.ir.errors import OptionError
from .metrics import Metrics


class Callback:
    """What a pipeline calls, on rank 0 alone; every method may be left out.

    A callback must not call what all ranks have to call (`step`, `evaluate`, `save`): only rank 0
    is here. What it raises is raised by the call that it was told of, on rank 0; that call is over
    then, and a script that ends by it ends on every rank, with this error as the cause.
    """

    def on_start(self, pipe: Any) -> None:
        """Before the first of the others: `compile` is about to return, or the callback was added
        to ``pipe.callbacks`` later, and something is to be told."""

    def on_step(self, pipe: Any, metrics: Metrics) -> None:
        """`step` has stepped, or `end_step` was called; ``pipe.metrics`` has the same metrics."""

    def on_evaluate(self, pipe: Any, results: Mapping[str, Any]) -> None:
        """`evaluate` has ``loss``, and each of its ``metrics=``."""

    def on_save(self, pipe: Any, path: Path) -> None:
        """`save` returns this folder; with ``async_save=True`` it is still being written."""


class Callbacks(list[Any]):
    """Those of a pipeline, in the order in which they are told; a list that users may change.

    Args:
        is_main: whether this process tells them.
    """

    def __init__(self, given: Any, is_main: bool):
        super().__init__(given)
        self._is_main = is_main
        self._started: list[Any] = []

    def start(self, pipe: Any) -> None:
        """Those that have not been told anything yet hear that it begins."""
        for each in self if self._is_main else ():
            if not any(each is other for other in self._started):
                self._started.append(each)
                self._call(each, "on_start", pipe)

    def tell(self, hook: str, pipe: Any, *told: Any) -> None:
        """Call this of all."""
        if self and self._is_main:
            self.start(pipe)
            for each in self:
                self._call(each, hook, pipe, *told)

    def _call(self, callback: Any, hook: str, *told: Any) -> None:
        method = getattr(callback, hook, None)
        if method is None:
            return
        try:
            method(*told)
        except Exception as error:
            error.add_note(f"in {type(callback).__name__}.{hook}, a callback of rank 0")
            raise


class Logger(Callback):
    """Writes numbers of steps and evaluations: what differs between loggers is `write`.

    Args:
        every: of so many steps one is written.

    A number that a device is still computing would have to be waited for, so on CUDA a step is
    written when the next one is, or before an evaluation or a save.
    """

    def __init__(self, every: int = 1):
        check_steps(type(self).__name__, "every", every)
        self._every = every
        self._waiting: Metrics | None = None

    def write(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        """One line, or point.

        Args:
            kind: "train" or "evaluate".
        """
        raise NotImplementedError

    def on_step(self, pipe: Any, metrics: Metrics) -> None:
        if metrics.step % self._every:
            return
        self.flush()
        self._waiting = metrics
        if not metrics.waits:
            self.flush()

    def on_evaluate(self, pipe: Any, results: Mapping[str, Any]) -> None:
        self.flush()
        numbers = {n: float(v) for n, v in results.items() if isinstance(v, (int, float))}
        self.write("evaluate", numbers, pipe.steps)

    def on_save(self, pipe: Any, path: Path) -> None:
        self.flush()

    def flush(self) -> None:
        """Write the step that waits for it."""
        metrics, self._waiting = self._waiting, None
        if metrics is not None:
            self.write("train", metrics.numbers(), metrics.step)


def check_steps(name: str, option: str, value: object) -> None:
    """Raises OptionError unless it is a number of steps."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name}({option}={value!r}): give a number of steps, 1 or more")

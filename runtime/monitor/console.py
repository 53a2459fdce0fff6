"""One line about the step that is under way: live on a terminal, now and then elsewhere."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console as Terminal
from rich.live import Live
from rich.text import Text

from ...compiler.report.quantities import bytes_text
from .callbacks import Callback, check_steps
from .metrics import Metrics

LIVE_S = 0.25  # between two pictures of the line on a terminal
PLAIN_S = 10.0  # between two lines elsewhere
BAR = 10  # characters


class Console(Callback):
    """Progress, loss, tokens/s, MFU, memory, learning rate and what time is left.

    On a terminal that is one line, which changes in place; output of the script goes above it.
    Elsewhere it is a line for the first step and then one every ten seconds, or as ``every`` says.

    Args:
        total: steps of the whole training, for the progress and the time that is left; those of a
            run that is resumed included.
        every: a line for every so many steps, on a terminal too, instead of by time.
        file: where it is written; None for standard output.
    """

    def __init__(
        self, total: int | None = None, every: int | None = None, file: IO[str] | None = None
    ):
        for name, value in (("total", total), ("every", every)):
            if value is not None:
                check_steps("Console", name, value)
        self._total, self._every, self._file = total, every, file
        self._live: Live | None = None
        self._terminal: Terminal | None = None
        self._first: tuple[int, float] | None = None  # step, and when it was over
        self._shown_s = -PLAIN_S
        self._evaluated = ""

    def on_start(self, pipe: Any) -> None:
        self._terminal = Terminal(file=self._file or sys.stdout, highlight=False, soft_wrap=True)
        if self._terminal.is_terminal:
            self._live = Live(console=self._terminal, auto_refresh=False)
            atexit.register(self._live.stop)  # or the cursor stays hidden

    def on_step(self, pipe: Any, metrics: Metrics) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = metrics.step, now
        last = metrics.step == self._total
        if not last and not self._due(metrics.step, now):
            return
        self._shown_s = now
        self._show(self._line(metrics, now))
        if last and self._live is not None:
            self._live.stop()

    def on_evaluate(self, pipe: Any, results: Mapping[str, Any]) -> None:
        numbers = [f"{n} {v:.4g}" for n, v in results.items() if isinstance(v, (int, float))]
        self._print(f"step {pipe.steps}  evaluated: {', '.join(numbers)}")

    def on_save(self, pipe: Any, path: Path) -> None:
        self._print(f"step {pipe.steps}  saved: {path}")

    def close(self) -> None:
        """End the live line, which the end of the script does otherwise."""
        if self._live is not None:
            self._live.stop()

    # -- the inside -------------------------------------------------------------------------

    def _due(self, step: int, now_s: float) -> bool:
        if self._every is not None:
            return step % self._every == 0
        return now_s - self._shown_s >= (PLAIN_S if self._live is None else LIVE_S)

    def _line(self, metrics: Metrics, now_s: float) -> str:
        parts = [f"step {metrics.step}"]
        if self._total is not None:
            done = min(BAR, metrics.step * BAR // self._total)
            parts = [f"{'█' * done}{'░' * (BAR - done)}"] if self._live is not None else []
            parts.append(f"step {metrics.step}/{self._total}")
        parts.append(f"loss {metrics.loss:.4f}")
        if metrics.tokens_per_s is not None:
            parts.append(f"{metrics.tokens_per_s:,.0f} tokens/s")
        else:
            parts.append(f"{metrics.rows_per_s:,.1f} rows/s")
        if metrics.mfu is not None:
            parts.append(f"MFU {metrics.mfu:.1%}")
        held = "" if metrics.peak_bytes is None else f"{bytes_text(metrics.peak_bytes)} of "
        parts.append(f"memory {held}{bytes_text(metrics.planned.peak_bytes)} planned")
        if metrics.lr is not None:
            parts.append(f"lr {metrics.lr:.2e}")
        if metrics.overflowed:
            parts.append("skipped: fp16 overflow")
        parts += self._left(metrics.step, now_s)
        return "  ".join(parts)

    def _left(self, step: int, now_s: float) -> list[str]:
        """What time is left, by that of all steps since the first, which has compiled."""
        if self._total is None or self._first is None or step <= self._first[0]:
            return []
        first, since_s = self._first
        left_s = (now_s - since_s) / (step - first) * max(0, self._total - step)
        minutes, seconds = divmod(round(left_s), 60)
        hours, minutes = divmod(minutes, 60)
        return [f"{hours}:{minutes:02}:{seconds:02} left"]

    def _show(self, line: str) -> None:
        if self._live is None:
            self._print(line)
            return
        if not self._live.is_started:
            self._live.start()
        self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def _print(self, line: str) -> None:
        assert self._terminal is not None, "on_start has made it"
        self._terminal.print(Text(line))

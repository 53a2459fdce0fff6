"""Stopping a run in time: a signal or a deadline that all ranks heed after the same step.

Whether this process is to stop travels with what ranks announce before each batch, which they
exchange anyway. So it costs no message, and what one rank was told before a step, all of them know
once it is over.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any
from weakref import WeakSet

from ...compiler.ir.errors import OptionError

DEADLINE = -1  # where others have the number of a signal
_SLURM_END = "SLURM_JOB_END_TIME"  # seconds since 1970
_RECENT = 32  # batches: a compilation long ago says nothing of the next step

_listening: WeakSet[Preemption] = WeakSet()


class Preemption:
    """Says, on every rank after the same step, that the run is about to be ended.

        stop = pipecompile.Preemption(limit_s=12 * 3600)
        for batch in loader:
            pipe.step(batch)
            if stop.requested:
                pipe.save("run")
                break

    Every rank makes one. It listens to signals until the process ends, or `close`.

    Args:
        signals: names of those that announce the end; the handlers that they had are called too,
            but for those that would end the process.
        limit_s: how long this process may run, in seconds from now; by default until
            ``SLURM_JOB_END_TIME``, where the scheduler has set it, else for ever.
        margin_s: how much earlier to stop: a save has to fit into it. The longest
            of the last 32 batches is added.

    Attributes:
        requested: all ranks are to stop now. It changes while a batch runs, on every rank in the
            same one.

    Raises:
        OptionError: no such signal, a limit below 0, or not in the main thread, which alone may
            listen to signals.
    """

    def __init__(
        self,
        signals: Iterable[str] = ("SIGTERM", "SIGUSR1"),
        *,
        limit_s: float | None = None,
        margin_s: float = 120.0,
    ):
        self.requested = False
        self._heard = 0  # by this process: the number of a signal, or DEADLINE
        self._cause = (0, 0)  # of all: that, and the rank that heard it
        self._end_s = _deadline(limit_s, margin_s)
        self._last_s = math.nan
        self._between_s: deque[float] = deque(maxlen=_RECENT)
        self._before: dict[int, Any] = {}
        numbers = [_number(name) for name in signals]
        if numbers and threading.current_thread() is not threading.main_thread():
            raise OptionError("Preemption() listens to signals: make it in the main thread")
        for number in numbers:
            self._before[number] = signal.signal(number, self._hear)
        _listening.add(self)

    @property
    def reason(self) -> str:
        """Why, the same on every rank: "SIGTERM on rank 0"; "" while nothing is requested."""
        if not self.requested:
            return ""
        heard, rank = self._cause
        told = "the time limit" if heard == DEADLINE else signal.Signals(heard).name
        return f"{told} on rank {rank}"

    def close(self) -> None:
        """Listen no longer: signals do what they did before."""
        _listening.discard(self)
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._hear:
                signal.signal(number, handler)
        self._before.clear()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = self._heard or number
        before = self._before.get(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    def _here(self) -> int:
        """What this process has heard of, before a batch; 0 for nothing."""
        now = time.monotonic()
        if not math.isnan(self._last_s):
            self._between_s.append(now - self._last_s)
        self._last_s = now
        if not self._heard and now + max(self._between_s, default=0.0) >= self._end_s:
            self._heard = DEADLINE
        return self._heard

    def _learn(self, heard: Sequence[int]) -> None:
        """What every rank has heard of."""
        rank = next((rank for rank, each in enumerate(heard) if each), None)
        if rank is not None and not self.requested:
            self._cause, self.requested = (heard[rank], rank), True


def heard_here() -> int:
    """What this process is to tell before a batch: 0, or why it is to stop."""
    return next(filter(None, [each._here() for each in tuple(_listening)]), 0)


def learn(heard: Sequence[int]) -> None:
    """What all ranks have told."""
    for each in tuple(_listening):
        each._learn(heard)


def _number(name: str) -> int:
    with contextlib.suppress(KeyError, TypeError):
        return int(signal.Signals[name])
    raise OptionError(
        f"Preemption(signals=...) has {name!r}: give names of signals, such as SIGTERM"
    )


def _deadline(limit_s: float | None, margin_s: float) -> float:
    """By `time.monotonic`."""
    for name, value in (("limit_s", limit_s), ("margin_s", margin_s)):
        if value is not None and (isinstance(value, bool) or not value >= 0):
            raise OptionError(f"Preemption({name}={value!r}): give seconds, 0 or more")
    if limit_s is None:
        told = os.environ.get(_SLURM_END, "")
        if not told.isdigit():
            return math.inf
        limit_s = int(told) - time.time()
    return time.monotonic() + limit_s - margin_s

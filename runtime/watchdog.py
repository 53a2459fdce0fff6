"""When one rank fails, all others stop within seconds and say why.

The first rank to fail writes its error to the store that the processes met through. A rank
whose own error is only the echo of that (a closed connection) raises `PeerFailedError` with the
first cause on top. A rank that is blocked and gets no echo is ended by its watchdog thread.

The store is reached through `_get_default_store`: torch.distributed has no public name for it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ..compiler.errors import PeerFailedError, PipecompileError

POLL_S = 0.5
GRACE_S = 5.0  # how long a rank may take to notice by itself that another one failed
QUIET_S = 60.0  # after this long in one action, say which

_KEY = "pipecompile/failure"


class Watchdog:
    """Guards the work of one process of a distributed run.

    Args:
        status: what this rank is doing, like ``1RECV_F3←0``; "" when it is not at work.
    """

    def __init__(self, rank: int, status: Callable[[], str]):
        self.rank, self.status = rank, status
        self.store = PrefixStore("pipecompile", _get_default_store())
        self.working = threading.Event()
        previous = sys.excepthook

        def report(
            kind: type[BaseException], error: BaseException, trace: TracebackType | None
        ) -> None:
            self.report(error)
            previous(kind, error, trace)

        sys.excepthook = report
        threading.Thread(target=self._watch, daemon=True, name="pipecompile-watchdog").start()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run a piece of work in which a failure of any rank is a failure of all."""
        self.working.set()
        try:
            yield
        except Exception as error:
            cause = self.first_failure(wait_s=0.0 if _is_own(error) else 2.0)
            if cause is None:
                self.report(error)
                raise
            raise PeerFailedError(cause) from error
        finally:
            self.working.clear()

    def report(self, error: BaseException) -> None:
        """Tell the other ranks, unless one of them was first."""
        if isinstance(error, (PeerFailedError, KeyboardInterrupt, SystemExit)):
            return
        text = "".join(traceback.format_exception(error)).strip()
        doing = f" during {self.status()}" if self.status() else ""
        message = (
            f"rank {self.rank} failed first{doing}: {type(error).__name__}: {error}\n\n"
            f"Its traceback:\n{text}"
        )
        try:
            if self.store.add("failures", 1) == 1:
                self.store.set(_KEY, f"{self.rank}\n{message}")
        except Exception:
            return  # the store's process is gone, and with it whoever could read this

    def first_failure(self, wait_s: float = 0.0) -> str | None:
        """The first failure of another rank, if one was reported (within a time)."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                if self.store.check([_KEY]):
                    rank, _, message = self.store.get(_KEY).decode().partition("\n")
                    return None if int(rank) == self.rank else message
            except Exception:
                return None
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)

    def _watch(self) -> None:
        seen_at: float | None = None
        doing, since, told = "", time.monotonic(), False
        while True:
            time.sleep(POLL_S)
            now = time.monotonic()
            if not self.working.is_set():
                seen_at, doing = None, ""
                continue
            if (current := self.status()) != doing:
                doing, since, told = current, now, False
            elif now - since > QUIET_S and not told:
                told = True
                print(
                    f"pipecompile: rank {self.rank} has been in {doing or 'start-up'} for "
                    f"{now - since:.0f} s",
                    file=sys.stderr,
                )
            failure = self.first_failure()
            if failure is None:
                continue
            seen_at = seen_at or now
            if now - seen_at > GRACE_S:
                print(f"pipecompile: rank {self.rank} stops: {failure}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)


def _is_own(error: Exception) -> bool:
    """Whether an error can only come from this rank: user mistakes that pipecompile names."""
    return isinstance(error, PipecompileError)

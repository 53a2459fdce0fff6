"""When one rank fails, all others stop within seconds and say why.

The first rank to fail writes its error to the store that the processes met through. A rank
whose own error is only the echo of that (a closed connection) raises `PeerFailedError` with the
first cause on top. A rank that is blocked and gets no echo is ended by its watchdog thread.

Guarded calls are counted, alike on all ranks, and a failure belongs to its call: an error that
every rank caught is no longer one in the next call.

The store is reached through `_get_default_store`: torch.distributed has no public name for it.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ...compiler.ir.errors import PeerFailedError, PipecompileError

POLL_S = 0.5
GRACE_S = 5.0  # how long a rank may take to notice by itself that another one failed
ECHO_S = 2.0  # how long the first cause may take to reach the store
QUIET_S = 60.0  # after this long in one action, say which

_FATAL = "fatal"  # the key of an error that ended a process outside of any guarded call
_living: weakref.WeakSet[Watchdog] = weakref.WeakSet()


class Watchdog:
    """Guards the work of one process of a distributed run.

    Args:
        name: the same on all ranks, another for every watchdog of a process.
        status: what this rank is doing, like ``1RECV_F3←0``; "" when it is not at work. Held
            weakly: the watchdog ends with its owner.
    """

    def __init__(self, rank: int, name: str, status: Callable[[], str]):
        self.rank = rank
        self._status = weakref.WeakMethod(status)
        self.store = PrefixStore(f"pipecompile/{name}", _get_default_store())
        self.call = 0
        self.working = False
        if not _living:
            _hook_exceptions()
        _living.add(self)
        watch = threading.Thread(
            target=_watch, args=(weakref.ref(self),), daemon=True, name="pipecompile-watchdog"
        )
        watch.start()

    def status(self) -> str:
        method = self._status()
        return method() if method is not None else ""

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Run a piece of work in which a failure of any rank is a failure of all.

        Args:
            what: the call that it is for.
        """
        self.call += 1
        self.working = True
        try:
            yield
        except PipecompileError as error:
            self.report(error, str(self.call))
            raise
        except Exception as error:
            cause = self.first_failure(ECHO_S) or _ended(error, f"rank {self.rank} is in {what}")
            if cause is not None:
                raise PeerFailedError(cause) from error
            self.report(error, str(self.call))
            raise
        finally:
            self.working = False

    def report(self, error: BaseException, key: str) -> None:
        """Tell the other ranks, unless one of them was first."""
        if isinstance(error, PeerFailedError):
            return
        doing = f" during {self.status()}" if self.status() else ""
        text = "".join(traceback.format_exception(error)).strip()
        message = (
            f"{self.rank}\nrank {self.rank} failed first{doing}: {type(error).__name__}: {error}"
            f"\n\nIts traceback:\n{text}"
        )
        try:
            if self.store.add(f"{key}/count", 1) == 1:
                self.store.set(key, message)
        except Exception:
            return  # the store's process is gone, and with it whoever could read this

    def first_failure(self, wait_s: float = 0.0) -> str | None:
        """The first failure of another rank in this call, if one is reported within a time."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                for key in (str(self.call), _FATAL):
                    if self.store.check([key]):
                        rank, _, message = self.store.get(key).decode().partition("\n")
                        return None if int(rank) == self.rank else message
            except Exception:
                return None
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)


_CLOSED = re.compile("closed by peer|reset by peer|Broken pipe", re.IGNORECASE)
"""How gloo says that a process has ended."""


def _ended(error: Exception, here: str) -> str | None:
    """What is said where another rank has ended, and not by an error that it could tell."""
    if isinstance(error, ConnectionError):
        lost = str(error)
    elif isinstance(error, RuntimeError) and _CLOSED.search(str(error)):
        lost = f"a rank has ended ({str(error).strip()})"
    else:
        return None
    return (
        f"{lost}, and {here}: it was killed, or its script has ended earlier than those of others. "
        "Every rank must make the same calls of a pipeline"
    )


def _hook_exceptions() -> None:
    """An exception that ends this process, anywhere in the user's script, reaches the others."""
    previous = sys.excepthook

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            for watchdog in _living:
                watchdog.report(error, _FATAL)
        previous(kind, error, trace)

    sys.excepthook = report


def _watch(reference: weakref.ref[Watchdog]) -> None:
    """The thread of a watchdog: ends with it, or with the process."""
    noticed = changed = time.monotonic()
    doing, told, failing = "", False, False
    while True:
        time.sleep(POLL_S)
        watchdog = reference()
        if watchdog is None:
            return
        now = time.monotonic()
        failure = watchdog.first_failure() if watchdog.working else None
        if failure is None or not failing:
            noticed, failing = now, failure is not None
        elif now - noticed > GRACE_S:
            print(f"pipecompile: rank {watchdog.rank} stops: {failure}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
        current = watchdog.status() if watchdog.working else ""
        if current != doing:
            doing, changed, told = current, now, False
        elif current and not told and now - changed > QUIET_S:
            told = True
            print(
                f"pipecompile: rank {watchdog.rank} has been in {doing} for {now - changed:.0f} s",
                file=sys.stderr,
            )
        del watchdog

"""When one rank fails, all others stop within seconds and say why.

The first rank to fail writes its error to the store of this attempt. A rank whose own error is only
the echo of that (a closed connection) raises `PeerFailedError` with the first cause on top. A rank
that is blocked is woken, and then ended, by its watchdog thread. Ranks that die without a word, or
do not get on, are the lookout's (`lookout.py`).

Guarded calls are counted, alike on all ranks, and a failure belongs to its call: an error that
every rank caught is no longer one in the next call.
"""

from __future__ import annotations

import re
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.distributed_c10d import PrefixStore, Store

from ...compiler.ir.errors import PeerFailedError, PipecompileError
from ..transport.doing import HERE, Doing
from ..transport.quick_store import QuickStore, StoreSilentError
from .endings import watch_endings
from .lookout import Lookout, end

POLL_S = 0.5
GRACE_S = 5.0  # how long a rank may take to notice by itself that another one failed
ECHO_S = 2.0  # how long the first cause may take to reach the store

_FATAL = "fatal"  # the key of an error after which no call can succeed
_living: weakref.WeakSet[Watchdog] = weakref.WeakSet()


class Watchdog:
    """Guards the work of one process of a distributed run.

    Args:
        name: the same on all ranks, another for every watchdog of a process.
        store: of this attempt; no other thread uses it.
        lookout: tells of ranks that have died without a word.
        doing: where this process is.
    """

    def __init__(
        self,
        rank: int,
        name: str,
        store: Store,
        lookout: Lookout | None = None,
        doing: Doing = HERE,
    ):
        self.rank, self._lookout, self._doing = rank, lookout, doing
        self._store: QuickStore | None = QuickStore(PrefixStore(name, store))
        self.call = 0
        self.working = False
        self.over = threading.Event()
        watch_endings(rank, _report_fatal)
        _living.add(self)
        weakref.finalize(self, _stop, self.over, thread := _thread_of(self))
        thread.start()

    @contextmanager
    def guard(self, what: object, final: bool = False) -> Iterator[None]:
        """Run a piece of work in which a failure of any rank is a failure of all.

        Args:
            what: the call that it is for.
            final: a failure is one of all calls that follow, too.
        """
        self.call += 1
        key = _FATAL if final else str(self.call)
        before, self.working = self.working, True
        with self._doing.call(what):
            here = self._doing.place
            try:
                if self._lookout is not None and (cause := self._lookout.failure()) is not None:
                    raise PeerFailedError(cause)
                yield
            except PipecompileError as error:
                self.report(error, key)
                raise
            except Exception as error:
                cause = self.first_failure(ECHO_S) or self._ended(error, str(here))
                if cause is not None:
                    raise PeerFailedError(f"{cause}{_seen(error)}") from None
                self.report(error, key)
                raise
            finally:
                self.working = before

    def report(self, error: BaseException, key: str) -> None:
        """Tell the other ranks, unless one of them was first."""
        if isinstance(error, PeerFailedError):
            return
        place = self._doing.place
        where = f" {place}" if place.inside else ""
        text = "".join(traceback.format_exception(error)).strip()
        message = (
            f"{self.rank}\n{self._name} failed first{where}: {type(error).__name__}: {error}"
            f"\n\nIts traceback:\n{text}"
        )
        try:
            if self._store is not None and self._store.add(f"{key}/count", 1) == 1:
                self._store.set(key, message)
        except StoreSilentError:  # nobody can be told
            pass
        except Exception:
            self._store = None  # its process is gone, and with it whoever could read this

    @property
    def _name(self) -> str:
        return self._lookout.name(self.rank) if self._lookout else f"rank {self.rank}"

    def first_failure(self, wait_s: float = 0.0) -> str | None:
        """The first failure of another rank in this call, if one is reported within a time."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                for key in (str(self.call), _FATAL):
                    if (store := self._store) is not None and store.check([key]):
                        rank, _, message = store.get(key).decode().partition("\n")
                        return None if int(rank) == self.rank else message
            except StoreSilentError:  # what is known without it stands
                pass
            except Exception:
                self._store = None  # its process is gone; what is known without it stands
            failure = self._lookout.failure() if self._lookout is not None else None
            if failure is not None or time.monotonic() >= deadline:
                return failure
            time.sleep(0.01)  # torchrun soon ends those that have something to say

    def _ended(self, error: Exception, here: str) -> str | None:
        """What is said where another rank has ended, and not by an error that it could tell."""
        if not isinstance(error, ConnectionError) and not (
            isinstance(error, RuntimeError) and _CLOSED.search(str(error))
        ):
            return None
        found = self._lookout.explain() if self._lookout is not None else None
        return found or (
            f"a rank has ended, and rank {self.rank} is {here}: it was killed, or its script has "
            "ended earlier than those of others. Every rank must make the same calls of a pipeline"
        )

    def wake(self) -> None:
        """Make what waits in this process fail."""
        self._doing.wake()


_CLOSED = re.compile(
    "closed by peer|reset by peer|Broken pipe|Connection refused|pair closure|Timed out waiting",
    re.IGNORECASE,
)
"""How gloo says that a process has ended, or that nobody waits any longer."""


def _seen(error: Exception) -> str:
    """How it was seen here, on a line of its own."""
    line = str(error).strip().splitlines()[0].partition(". This is typically")[0]
    return f"\n(seen here as {type(error).__name__}: {line})"


def _report_fatal(error: Exception) -> None:
    """An exception that ends this process, anywhere in the user's script, reaches the others."""
    for watchdog in _living:
        watchdog.report(error, _FATAL)


def _thread_of(watchdog: Watchdog) -> threading.Thread:
    return threading.Thread(
        target=_watch,
        args=(weakref.ref(watchdog), watchdog.over),
        daemon=True,
        name="pipecompile-watchdog",
    )


def _stop(over: threading.Event, thread: threading.Thread) -> None:
    """Python exits, which must not find the thread inside of the store, or the owner is gone."""
    over.set()
    if thread is not threading.current_thread():
        thread.join(1.0)


def _watch(reference: weakref.ref[Watchdog], over: threading.Event) -> None:
    """The thread of a watchdog: ends with it, or with the process."""
    noticed = woken = time.monotonic()
    failing = False
    while not over.wait(POLL_S):
        watchdog = reference()
        if watchdog is None:
            return
        now = time.monotonic()
        failure = watchdog.first_failure() if watchdog.working else None
        if failure is None or not failing:
            noticed = woken = now
            failing = failure is not None
        elif now - noticed > 2 * GRACE_S and watchdog.working:  # it may have noticed meanwhile
            end(watchdog._doing, watchdog.rank, failure)
        elif now - woken > GRACE_S:
            woken = now + GRACE_S
            watchdog.wake()
        del watchdog

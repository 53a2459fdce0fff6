"""A store that answers soon or says that it does not.

The store of a run is on one machine. Where the network to it is cut, an operation waits until the
system gives up the connection, a quarter of an hour later; who watches over a run cannot.
"""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed.distributed_c10d import Store

from .doing import FAILED, HERE

ANSWER_S = 5.0
"""How long an operation may take. A connection that was interrupted for less goes on by itself."""


class StoreSilentError(Exception):
    """The store has not answered in time; it may do so later."""


class QuickStore:
    """Does one operation after the other in a thread of its own, which nobody waits for longer
    than `ANSWER_S`; while one is under way all others fail at once.

    Args:
        store: that no other thread uses.
    """

    def __init__(self, store: Store):
        self._store: Any = store
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._turn = threading.Lock()
        self._pending: _Job | None = None
        self._thread: threading.Thread | None = None
        _stores.add(self)

    @property
    def silent(self) -> bool:
        """Whether an operation has not been answered yet."""
        return self._pending is not None and not self._pending.over.is_set()

    def set(self, key: str, value: str) -> None:
        self._do(self._store.set, key, value)

    def get(self, key: str) -> bytes:
        """Of a key that is there; see `check`."""
        value: bytes = self._do(self._store.get, key)
        return value

    def add(self, key: str, amount: int) -> int:
        return int(self._do(self._store.add, key, amount))

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._do(self._store.check, keys))

    def _do(self, operation: Callable[..., Any], *args: Any) -> Any:
        """Raises StoreSilentError, or what the operation does."""
        deadline = time.monotonic() + ANSWER_S
        if not self._turn.acquire(timeout=ANSWER_S):
            raise StoreSilentError
        try:
            if self.silent:
                raise StoreSilentError
            if self._thread is None:
                self._begin()
            job = self._pending = _Job(operation, args)
            self._jobs.put(job)
            if not job.over.wait(max(0.0, deadline - time.monotonic())):
                raise StoreSilentError
            if job.error is not None:
                raise job.error
            return job.result
        finally:
            self._turn.release()

    def _begin(self) -> None:
        """With the first operation."""
        name = "pipecompile-store"
        self._thread = threading.Thread(target=_work, args=(self._jobs,), daemon=True, name=name)
        self._thread.start()
        weakref.finalize(self, self._jobs.put, None).atexit = False


class _Job:
    """An operation, and what has come of it once it is over."""

    def __init__(self, operation: Callable[..., Any], args: Sequence[Any]):
        self.operation, self.args, self.over = operation, args, threading.Event()
        self.result: Any = None
        self.error: Exception | None = None


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    """The thread of a store."""
    while (job := jobs.get()) is not None:
        try:
            job.result = job.operation(*job.args)
        except Exception as error:
            job.error = error
        job.over.set()
        del job


_stores: weakref.WeakSet[QuickStore] = weakref.WeakSet()


@atexit.register
def _leave() -> None:
    """End a process that has failed while a thread is inside of the store.

    If the store goes while Python ends, the thread comes back to a Python that is no more, and the
    process would abort ("terminate called without an active exception") instead of ending with 1.
    """
    if HERE.place.fate == FAILED and any(store.silent for store in list(_stores)):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

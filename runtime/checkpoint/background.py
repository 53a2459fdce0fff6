"""One piece of work at a time that goes on while training does."""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable

_unseen: list[Exception] = []
"""Errors that nobody has waited for."""


class Background:
    """Runs one function at a time in a thread.

    Python waits for the thread before it exits, so what has begun is finished even if its owner
    is gone. An error is raised by the next `wait`; if none comes, it is printed at exit.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._join: Callable[[threading.Thread], None] = threading.Thread.join
        self._error: Exception | None = None

    def start(
        self,
        work: Callable[[], object],
        join: Callable[[threading.Thread], None] = threading.Thread.join,
    ) -> None:
        """Run it; nothing else may be running: call `wait` before.

        Args:
            join: waits for a thread, and notes what that does meanwhile.
        """
        self._join = join

        def run() -> None:
            try:
                work()
            except Exception as error:
                self._error = error
                _unseen.append(error)

        self._thread = threading.Thread(target=run, name="pipecompile-save", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Until the work is done.

        Raises:
            Exception: what it ended with; once.
        """
        if self._thread is not None:
            self._join(self._thread)
            self._thread = None
        if (error := self._error) is not None:
            self._error = None
            _unseen.remove(error)
            raise error


@atexit.register
def _report() -> None:
    for error in _unseen:
        print(f"pipecompile: a save in the background failed: {error}", file=sys.stderr)

"""For whom this process waits inside of a library that moves all ranks by turns.

    rank 0   work ─ waits for all ─ work of all ─────── waits for all ─ work of all
    rank 3   work ─ waits for rank 0 ─ its own work ─── waits for rank 0

Such a library (torch.distributed.checkpoint) waits where nothing of ours runs. But it calls ours
for every piece of work, so that the waits are what is between these.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

from .doing import HERE, told

_LOOK_S = 0.05  # at a thread that does it beside


class Turns:
    """Of one process, in one such piece of work.

    Args:
        size: of the processes; where there is one nothing is noted.
        beside: another thread does it beside the training, and nobody waits but who `join`s it.

    Attributes:
        rank: this one.
        awaited: the ranks that are waited for now; () while this process is at work.
    """

    def __init__(self, rank: int, size: int, beside: bool = False):
        self.rank = rank
        self._others = tuple(each for each in range(size) if each != rank)
        self._coordinator = (0,) if rank else self._others
        self._noted = not beside and bool(self._others)
        self._wait: AbstractContextManager[None] = nullcontext()
        self._what = ""
        self.awaited: tuple[int, ...] = ()

    def work(self, what: str) -> None:
        """This process is at work, in something that is told by this name."""
        self.end()
        self._name(what)

    def wait(self, what: str) -> None:
        """It waits for the others now: all give rank 0 what they have, and get an answer."""
        self.end()
        self._name(what)
        self.awaited = self._coordinator
        if self._noted:
            self._wait = HERE.waiting(self.awaited)
            self._wait.__enter__()

    def end(self) -> None:
        """It does not wait any more."""
        self._wait.__exit__(None, None, None)
        self._wait, self.awaited = nullcontext(), ()

    def join(self, thread: threading.Thread) -> None:
        """Wait for the thread that does it beside the training, and for whom that waits."""
        with HERE.phase(self._what):
            while thread.is_alive():
                awaited, what = self.awaited, self._what
                HERE.act(told(what))
                with HERE.waiting(awaited) if awaited else nullcontext():
                    while thread.is_alive() and (self.awaited, self._what) == (awaited, what):
                        thread.join(_LOOK_S)

    def _name(self, what: str) -> None:
        self._what = what
        if self._noted:
            HERE.act(told(what))

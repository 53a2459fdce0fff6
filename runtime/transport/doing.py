"""What this process is doing and for whom it waits, for those that watch over the run.

It stands on a page of memory that other processes of the machine can read, also after this one has
been killed: that costs a step nothing but a copy of some bytes per action.

    bytes   0 .. 63    the action or phase that it is in, as text; nothing between two
           64 .. 191   the call of a user that it is in, or was in last
          192          what has become of it: one of the letters below
          193          1 inside of a call
          200 .. 207   the number of that call, of this process
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

SIZE = mmap.PAGESIZE
ROOM = 64  # bytes of an action
_CALL = slice(ROOM, 192)
_FATE, _INSIDE = 192, 193
_ORDER = slice(200, 208)
_NUMBER = struct.Struct("<q")
AT_WORK, ENDED, FAILED = b"w", b"e", b"f"


def told(text: object) -> bytes:
    """The bytes of an action, as `Doing.act` takes them."""
    return str(text).encode()[:ROOM].ljust(ROOM, b"\0")


NOTHING = told("")


@dataclass(frozen=True)
class Place:
    """Where a process is, or was when it ended.

    Attributes:
        action: or phase; "" between them.
        call: of a user, with its number; "" before the first one.
        inside: of that call, or after it.
        order: the number of the call, of that process.
        fate: AT_WORK, ENDED by itself, or FAILED with an error that it could tell.
    """

    action: str = ""
    call: str = ""
    inside: bool = False
    order: int = 0
    fate: bytes = AT_WORK

    def __str__(self) -> str:
        if not self.inside:
            after = f"after {self.call}" if self.call else "before the first one"
            return f"outside of the pipeline's calls, {after}"
        return f"in {self.action}, in {self.call}" if self.action else f"in {self.call}"


def place_of(page: Any) -> Place:
    """What a page says."""
    return Place(
        _text(page[:ROOM]),
        _text(page[_CALL]),
        bool(page[_INSIDE]),
        _NUMBER.unpack(bytes(page[_ORDER]))[0],
        bytes(page[_FATE : _FATE + 1]),
    )


def _text(content: bytes) -> str:
    return bytes(content).rstrip(b"\0").decode(errors="replace")


class Wait(NamedTuple):
    """For some ranks, since a moment of `time.monotonic`."""

    ranks: tuple[int, ...]
    since: float


class _Waiting:
    """Notes a wait of this thread while it lasts."""

    __slots__ = ("_before", "_ranks", "_thread", "_waits")

    def __init__(self, waits: dict[int, Wait], ranks: Sequence[int]):
        self._waits, self._ranks, self._thread = waits, tuple(ranks), threading.get_ident()

    def __enter__(self) -> None:
        self._before = self._waits.get(self._thread)
        self._waits[self._thread] = Wait(self._ranks, time.monotonic())

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            del self._waits[self._thread]
        else:
            self._waits[self._thread] = self._before


class Sleeper(Protocol):
    """Something that waits for other ranks."""

    def wake(self) -> None:
        """Make what waits there fail with an error, now or later; called from another thread."""
        ...


class Doing:
    """Of one process: where it is, for whom its threads wait, and how to wake them.

    Attributes:
        calls: how many calls have begun.
    """

    def __init__(self) -> None:
        self._page: Any = bytearray(SIZE)
        self._page[_FATE : _FATE + 1] = AT_WORK
        self._waits: dict[int, Wait] = {}
        self._sleepers: weakref.WeakSet[Sleeper] = weakref.WeakSet()
        self._file = -1
        self.calls = 0

    def share(self) -> int:
        """The number of this process's open file that is its page; -1 where there is none."""
        if self._file < 0 and hasattr(os, "memfd_create"):
            self._file = os.memfd_create("pipecompile-page")
            os.ftruncate(self._file, SIZE)
            page = mmap.mmap(self._file, SIZE)
            page[:] = bytes(self._page)
            self._page = page
        return self._file

    @property
    def place(self) -> Place:
        return place_of(self._page)

    @property
    def inside(self) -> bool:
        """Of a call."""
        return bool(self._page[_INSIDE])

    def act(self, action: bytes) -> None:
        """Note an action that begins, as `told` makes it."""
        self._page[:ROOM] = action

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """What happens inside is told by this name; actions inside have their own.

        Where it fails the name stays, for who tells of that, until the call is over.
        """
        before = bytes(self._page[:ROOM])
        self.act(told(what))
        yield
        self.act(before)

    @contextlib.contextmanager
    def call(self, what: object) -> Iterator[None]:
        """A call of a user; one may make others."""
        before = bytes(self._page[: _INSIDE + 1])
        nested = bool(self._page[_INSIDE])
        self.calls += 1
        self._page[:ROOM] = NOTHING
        self._page[_CALL] = str(what).encode()[:128].ljust(128, b"\0")
        self._page[_ORDER] = _NUMBER.pack(self.calls)
        self._page[_INSIDE] = 1
        try:
            yield
        finally:
            if nested:
                self._page[: _INSIDE + 1] = before
            else:
                self._page[:ROOM] = NOTHING
                self._page[_INSIDE] = 0

    def end(self, fate: bytes) -> None:
        """This process is about to end, and has told why; what was said first stands."""
        if self._page[_FATE : _FATE + 1] == AT_WORK:
            self._page[_FATE : _FATE + 1] = fate

    def waiting(self, ranks: Sequence[int]) -> _Waiting:
        """Inside, this thread waits for these ranks."""
        return _Waiting(self._waits, ranks)

    def waits(self) -> list[Wait]:
        """Of all threads, the one that has lasted longest first."""
        waits = list(self._waits.values())  # at once, as other threads come and go
        return sorted(waits, key=lambda wait: wait.since)

    def wakes(self, sleeper: Sleeper) -> None:
        """Wake this too; held weakly."""
        self._sleepers.add(sleeper)

    def wake(self) -> None:
        """Make all waits fail: a rank has gone that they need."""
        for sleeper in list(self._sleepers):
            sleeper.wake()


HERE = Doing()
"""Of this process."""

"""What this process's ranks do, noted while they do it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ...compiler.ir.actions import RECV, Action
from ...compiler.ir.program import Message
from ...compiler.trace.trace import Lane
from .clock import Clock, Mark, clock_of

_COMMUNICATION = frozenset(("SEND_F", "SEND_B", "RECV_F", "RECV_B"))


@dataclass(frozen=True)
class Entry:
    """Something that a rank did; times are those of its process's clock."""

    rank: int
    lane: Lane
    name: str
    step: int
    start_ns: int
    end_ns: int
    nbytes: int = 0
    held: int | None = None


class RankLog:
    """Of one rank: a tuple per action, no more, as the step is under way.

    Attributes:
        step: the number of the range that is under way.
    """

    def __init__(self, rank: int, clock: Clock):
        self.rank, self.clock = rank, clock
        self.now = clock.now
        self.step = 0
        self._done: list[tuple[Action, int, Mark, Mark, int, int | None]] = []
        self._other: list[tuple[Lane, str, int, Mark, Mark]] = []

    def add(self, action: Action, start: Mark, message: Message | None = None) -> Mark:
        """An action ends now; so does a wait for a message, as the receive that it is; now."""
        held = self.clock.held() if action.kind.computes else None
        end = self.now()
        nbytes = 0 if message is None else message.nbytes
        self._done.append((action, self.step, start, end, nbytes, held))
        return end

    def waited(self, message: Message, index: int, start: Mark) -> Mark:
        """A computation has a message that it waited for from ``start`` on; now."""
        receive = Action(message.dst, RECV[message.phase], index, message.src)
        return self.add(receive, start, message)

    def other(self, lane: Lane, name: str, start: Mark) -> None:
        """Something that is no action ends now."""
        self._other.append((lane, name, self.step, start, self.now()))

    def entries(self) -> Iterable[Entry]:
        """All that was noted; the clock has settled."""
        when = self.clock.nanoseconds
        for action, step, start, end, nbytes, held in self._done:
            lane = _lane(action)
            yield Entry(self.rank, lane, str(action), step, when(start), when(end), nbytes, held)
        for lane, name, step, start, end in self._other:
            yield Entry(self.rank, lane, name, step, when(start), when(end))


class ProcessLog:
    """The logs of this process's ranks.

    Args:
        devices: rank -> where it computes.
    """

    def __init__(self, devices: Mapping[int, torch.device]):
        clocks = {device: clock_of(device) for device in devices.values()}
        self.ranks = {rank: RankLog(rank, clocks[device]) for rank, device in devices.items()}
        self._clocks = tuple(clocks.values())
        self._range: tuple[str, list[Mark]] | None = None
        self._ranges = 0

    @property
    def memory(self) -> str:
        return self._clocks[0].memory

    @property
    def busy(self) -> bool:
        """Whether a range is under way."""
        return self._range is not None

    def begin(self, name: str) -> None:
        """A range begins."""
        for clock in self._clocks:
            clock.begin()
        for log in self.ranks.values():
            log.step = self._ranges
        self._range = name, [log.now() for log in self.ranks.values()]
        self._ranges += 1

    def end(self) -> None:
        """It ends."""
        if self._range is not None:
            name, starts = self._range
            for log, start in zip(self.ranks.values(), starts, strict=True):
                log.other(Lane.STEP, name, start)
        self._range = None

    def entries(self) -> list[Entry]:
        for clock in self._clocks:
            clock.settle()
        return [entry for log in self.ranks.values() for entry in log.entries()]


def _lane(action: Action) -> Lane:
    if action.kind.computes:
        return Lane.COMPUTE
    return Lane.COMMUNICATION if action.kind.value in _COMMUNICATION else Lane.CLOSING

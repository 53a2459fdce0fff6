"""Runs a schedule on paper: when every action starts, every message arrives, and what gets stuck.

It keeps the rules by which ranks run:

- A rank takes its actions in order. A computation waits for the receives that stand before it and
  that it reads; nothing else waits: sends and receives are posted, and go on beside what follows.
- What one rank sends to another is a link of its own. The n-th send of a link and its n-th receive
  are the two ends of one message, whatever they are called, as with NCCL.
- *Eager*: a message is under way from its send on. *Rendezvous*: from when both ends are posted,
  and the one before it on its link has arrived.

What replicas exchange costs nothing here. All is linear in the number of actions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ...compiler.ir.actions import COMPUTE_OF, RECV, SEND, Action, Kind, Schedule, homes_of

READS = {kind: COMPUTE_OF[phase] for phase, kind in RECV.items()}
MAKES = {kind: COMPUTE_OF[phase] for phase, kind in SEND.items()}
"""Kind of a receive, or of a send -> of the computation that reads, or makes, its values."""

Numbers = dict[int | None, int]
NOTHING: Mapping[int | None, tuple[Link, Numbers]] = MappingProxyType({})


@dataclass
class Link:
    """What one rank sends to another, in order.

    Attributes:
        sends: as posted.
        ready_s, posted_s: when the sends and the receives were posted.
        start_s, end_s: of those messages that get through.
        waiting: the rank that is stuck until another one does (in a faulty schedule, ranks).
    """

    src: int
    dst: int
    sends: list[Action] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)
    posted_s: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Stuck:
    """A rank that waits for ever: the place of its computation, and whom it waits for."""

    rank: int
    index: int
    waits_for: int


@dataclass(frozen=True)
class Run:
    """What happened.

    Attributes:
        start_s, end_s: per rank and action; shorter for a rank that got stuck. What does not
            compute takes no time, unless sends are said to.
        links: (from rank, to rank) -> its messages.
    """

    start_s: tuple[list[float], ...]
    end_s: tuple[list[float], ...]
    links: Mapping[tuple[int, int], Link]
    stuck: tuple[Stuck, ...]


def run(
    schedule: Schedule,
    compute_s: Mapping[tuple[int, Kind], float] | None = None,
    transfer_s: Mapping[tuple[int, int], float] | None = None,
    rendezvous: bool = True,
    send_s: Mapping[tuple[int, int], float] | None = None,
) -> Run:
    """Every rank as far as it gets.

    Args:
        compute_s: seconds of (stage, kind); where it is left out, each takes one.
        transfer_s: seconds of a message from one stage to another; 0 where not given.
        send_s: those of them in which its sender computes nothing; the same.
    """
    return _Clock(schedule, compute_s, transfer_s or {}, rendezvous, send_s or {}).run()


class _Clock:
    def __init__(
        self,
        schedule: Schedule,
        compute_s: Mapping[tuple[int, Kind], float] | None,
        transfer_s: Mapping[tuple[int, int], float],
        rendezvous: bool,
        send_s: Mapping[tuple[int, int], float],
    ):
        self.schedule, self.homes = schedule, homes_of(schedule)
        self.compute_s, self.transfer_s, self.send_s = compute_s, transfer_s, send_s
        self.rendezvous = rendezvous
        self.start_s: tuple[list[float], ...] = tuple([] for _ in schedule)
        self.end_s: tuple[list[float], ...] = tuple([] for _ in schedule)
        self.free_s = [0.0] * len(schedule)
        self.links: dict[tuple[int, int], Link] = {}
        # (stage, kind) -> of each stage that it hears: the link, and microbatch -> place on it
        self.awaited: dict[tuple[int, Kind], dict[int | None, tuple[Link, Numbers]]] = {}
        self.stuck: dict[int, Link] = {}

    def run(self) -> Run:
        ranks = list(range(len(self.schedule)))
        while ranks:
            ranks += self._advance(ranks.pop())
        stuck = [
            Stuck(rank, len(self.start_s[rank]), link.src) for rank, link in self.stuck.items()
        ]
        return Run(self.start_s, self.end_s, self.links, tuple(sorted(stuck, key=lambda s: s.rank)))

    def _advance(self, rank: int) -> Iterator[int]:
        """Run a rank until it is stuck; yields the ranks that can go on."""
        starts, ends = self.start_s[rank], self.end_s[rank]
        actions = self.schedule[rank]
        for position in range(len(starts), len(actions)):
            action = actions[position]
            kind = action.kind
            start = end = self.free_s[rank]
            if kind.computes:
                for link, numbers in self.awaited.get((action.stage, kind), NOTHING).values():
                    number = numbers.get(action.microbatch)
                    if number is None:
                        continue
                    if number >= len(link.end_s):
                        link.waiting.append(rank)
                        self.stuck[rank] = link
                        return
                    start = max(start, link.end_s[number])
                seconds = 1.0 if self.compute_s is None else self.compute_s[action.stage, kind]
                end = self.free_s[rank] = start + seconds
            elif kind in MAKES or kind in READS:
                posted = self._post(rank, action, start)
                if action.peer is not None and self.send_s and kind in MAKES:
                    took = self.send_s.get((action.stage, action.peer), 0.0)
                    end = self.free_s[rank] = start + took
                while posted is not None and posted.waiting:
                    other = posted.waiting.pop()
                    del self.stuck[other]
                    yield other
            starts.append(start)
            ends.append(end)

    def _post(self, rank: int, action: Action, now_s: float) -> Link | None:
        """One end of a message; returns its link if that has got further."""
        peer = -1 if action.peer is None else self.homes.get(action.peer, -1)
        sends = action.kind in MAKES
        key = (rank, peer) if sends else (peer, rank)
        link = self.links.get(key)
        if link is None:
            link = self.links[key] = Link(*key)
        if sends:
            link.sends.append(action)
            link.ready_s.append(now_s)
        else:
            heard = self.awaited.setdefault((action.stage, READS[action.kind]), {})
            numbers = heard.setdefault(action.peer, (link, {}))[1]
            numbers[action.microbatch] = len(link.posted_s)
            link.posted_s.append(now_s)
        return link if self._settle(link) else None

    def _settle(self, link: Link) -> bool:
        """Whether another message gets through, now that one more end is posted."""
        number = len(link.end_s)
        if number == len(link.ready_s):
            return False
        start = link.ready_s[number]
        if self.rendezvous:
            if number == len(link.posted_s):
                return False
            start = max(start, link.posted_s[number], link.end_s[-1] if number else 0.0)
        send = link.sends[number]
        ends = (send.stage, -1 if send.peer is None else send.peer)
        link.start_s.append(start)
        link.end_s.append(start + self.transfer_s.get(ends, 0.0))
        return True

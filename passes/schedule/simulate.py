"""Runs a schedule against costs: when every action starts and ends, and who waits for whom.

A receive is complete at the sender's end + transfer time; transfers do not occupy the compute
stream, but for what a device without engines of its own for that spends on sending; the makespan
is max over ranks of (last end − first start). A step is over when every rank has closed it:
gradients reduced, optimizer run.

That is the time of a link that takes any number of messages at once, from receives that were posted
long ago. With `rendezvous` a message also waits for its receive and for the one before it on its
link: with the receives of `passes.schedule.communication` that is the same time, unless messages
of two ranks overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...compiler.ir.actions import Action, Kind, Schedule
from ...compiler.ir.errors import VerificationError
from .clock import MAKES, Run, run


@dataclass(frozen=True, slots=True)
class Interval:
    """A compute action's time, in seconds from the start of the step.

    Attributes:
        held_bytes: what the rank holds when it is done; 0 where that was not asked for.
    """

    action: Action
    start_s: float
    end_s: float
    held_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Transfer:
    """A message between ranks, in seconds from the start of the step.

    Attributes:
        src, dst: stages.
        kind: F or B: of the action that makes its values, and of the one that reads them.
        start_s: when it is under way; `end_s`: when it has arrived.
    """

    src: int
    dst: int
    kind: Kind
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """Per rank of a replica, its compute actions in time, and what it does once per step then.

    Attributes:
        transfers: in the order of their ends.
    """

    ranks: tuple[tuple[Interval, ...], ...]
    closing_s: tuple[float, ...] = ()
    transfers: tuple[Transfer, ...] = ()

    @property
    def step_s(self) -> float:
        """From the first action to the end of the slowest optimizer; clipping waits for all."""
        end = max((row[-1].end_s for row in self.ranks if row), default=0.0)
        return end + max(self.closing_s, default=0.0)

    @property
    def makespan_s(self) -> float:
        return max((row[-1].end_s - row[0].start_s for row in self.ranks if row), default=0.0)

    def busy_s(self, rank: int) -> float:
        return sum(x.end_s - x.start_s for x in self.ranks[rank])

    def waiting_s(self, rank: int) -> float:
        """From the start of the step to the end of its last action, without what it computes."""
        row = self.ranks[rank]
        return row[-1].end_s - self.busy_s(rank) if row else 0.0

    @property
    def bubble(self) -> float:
        """The share of the ranks' time in which nothing is computed."""
        whole = self.makespan_s * len(self.ranks)
        busy = sum(self.busy_s(rank) for rank in range(len(self.ranks)))
        return 1 - busy / whole if whole else 0.0


def simulate(
    schedule: Schedule,
    compute_s: Mapping[tuple[int, Kind], float],
    transfer_s: Mapping[tuple[int, int], float],
    closing_s: Sequence[float] = (),
    held_bytes: Sequence[Sequence[int]] = (),
    rendezvous: bool = False,
    send_s: Mapping[tuple[int, int], float] | None = None,
) -> Timeline:
    """The timeline of one replica.

    Args:
        compute_s: seconds of (stage, kind that computes) per microbatch.
        transfer_s: seconds of a message from one stage to another; 0 where not given.
        closing_s: per rank, seconds after its last action.
        held_bytes: per rank and action, what is held after it.
        rendezvous: messages wait for their receives, and for each other on their link.
        send_s: of those of a message, in which its sender computes nothing; 0 where not given.

    Raises:
        VerificationError: ranks wait for each other for ever.
    """
    found = run(schedule, compute_s, transfer_s, rendezvous, send_s)
    if found.stuck:
        raise VerificationError("the schedule deadlocks")
    rows = []
    for rank, actions in enumerate(schedule):
        held = held_bytes[rank] if held_bytes else [0] * len(actions)
        times = zip(actions, found.start_s[rank], found.end_s[rank], held, strict=True)
        rows.append(tuple(Interval(*each) for each in times if each[0].kind.computes))
    return Timeline(tuple(rows), tuple(closing_s), _transfers(found))


def _transfers(found: Run) -> tuple[Transfer, ...]:
    made = []
    for link in found.links.values():
        for send, start, end in zip(link.sends, link.start_s, link.end_s, strict=False):
            assert send.peer is not None
            assert send.microbatch is not None
            kind = MAKES[send.kind]
            made.append(Transfer(send.stage, send.peer, kind, send.microbatch, start, end))
    return tuple(sorted(made, key=lambda transfer: (transfer.end_s, transfer.start_s)))


def waits(timeline: Timeline) -> tuple[dict[int, float], ...]:
    """Per rank, whom it waits for: rank -> seconds.

    A gap before an action is owed to the rank whose message to that action comes last, until it
    has arrived; what is left of it, for whatever reason, to the rank itself.
    """
    homes = {x.action.stage: rank for rank, row in enumerate(timeline.ranks) for x in row}
    latest: dict[tuple[int, Kind, int | None], Transfer] = {}
    for transfer in timeline.transfers:
        key = (transfer.dst, transfer.kind, transfer.microbatch)
        if key not in latest or transfer.end_s >= latest[key].end_s:
            latest[key] = transfer
    owed: list[dict[int, float]] = []
    for rank, row in enumerate(timeline.ranks):
        mine: dict[int, float] = {}
        free = 0.0
        for x in row:
            last = latest.get((x.action.stage, x.action.kind, x.action.microbatch))
            arrived = free if last is None else min(max(last.end_s, free), x.start_s)
            if last is not None and arrived > free:
                sender = homes[last.src]
                mine[sender] = mine.get(sender, 0.0) + arrived - free
            if x.start_s > arrived:
                mine[rank] = mine.get(rank, 0.0) + x.start_s - arrived
            free = x.end_s
        owed.append(mine)
    return tuple(owed)

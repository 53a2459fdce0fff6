"""Adds sends and receives to a schedule of compute actions.

Stages of one rank hand their values over in memory: there is nothing to send. Between ranks:

- A send follows the action that makes its values, in the order of the stages that it goes to.
- A receive is posted one compute action before the one that reads it, so that the transfer runs
  beside that computation; earlier where seconds are known and transfers take longer. A receive has
  room for its values from when it is posted, so that it is not posted earlier than that.
- All that one rank sends to another shares a link, whichever stages it is between: what is sent
  first is received first. On CUDA a link is an NCCL communicator with a stream of its own, whose
  kernels wait for their other ends; one communicator per pair of stages would leave it to the
  device which of two waiting kernels runs (NVIDIA's user guide warns of communicators used at
  once). With a link per direction no send waits behind a receive, and a rank has at most two
  kernels waiting per neighbour.

Why that cannot deadlock: a message gets through when both its ends are posted and the one before it
on its link is through. That one's send and receive stand earlier in the lists of the same two
ranks, so that the link adds no wait which these lists do not have.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from ...compiler.ir.actions import COMPUTE_OF, RECV, SEND, Action, Kind, Schedule, homes_of
from ...compiler.ir.program import Message

NO_MORE: tuple[int, Action | None] = (-1, None)
PHASE = {kind: phase for phase, kind in COMPUTE_OF.items()}

Sends = Mapping[tuple[int, Kind], Sequence[tuple[Kind, int]]]
"""(stage, kind of computation) -> kind and peer of the sends that follow it, in order."""


Slot = tuple[int, int, int, int]
"""Where a receive is posted: before which of the rank's computations; then, for the order among
those, the first computation that reads it or what follows it on its link, the rank that sends, and
its number on the link."""


def add_communication(
    schedule: Schedule,
    messages: Sequence[Message],
    compute_s: Mapping[tuple[int, Kind], float] | None = None,
    transfer_s: Mapping[tuple[int, int], float] | None = None,
) -> Schedule:
    """Insert what the messages between programs need.

    Args:
        compute_s: seconds of (stage, kind), where they are known.
        transfer_s: seconds of a message from one stage to another; 0 where not given.
    """
    sends = _sends(between_ranks(schedule, messages))
    receives = _receives(schedule, sends, compute_s, transfer_s or {})
    return tuple(
        tuple(_merged(actions, sends, receives[rank])) for rank, actions in enumerate(schedule)
    )


def between_ranks(schedule: Schedule, messages: Sequence[Message]) -> list[Message]:
    """Those messages whose ends are on two ranks."""
    homes = homes_of(schedule)
    return [m for m in messages if homes[m.src] != homes[m.dst]]


def _sends(messages: Sequence[Message]) -> Sends:
    sends: dict[tuple[int, Kind], list[tuple[Kind, int]]] = defaultdict(list)
    for m in sorted(messages, key=lambda m: m.dst):
        sends[m.src, COMPUTE_OF[m.phase]].append((SEND[m.phase], m.dst))
    return sends


def _receives(
    schedule: Schedule,
    sends: Sends,
    compute_s: Mapping[tuple[int, Kind], float] | None,
    transfer_s: Mapping[tuple[int, int], float],
) -> list[Iterator[tuple[int, Action]]]:
    """Per rank in order: before which of its computations they are posted, and the receives."""
    homes = homes_of(schedule)
    links: dict[tuple[int, int], list[tuple[Action, int]]] = defaultdict(list)
    readers: dict[tuple[int, Kind], dict[int | None, int]] = defaultdict(dict)
    for rank, actions in enumerate(schedule):
        for position, action in enumerate(actions):
            readers[action.stage, action.kind][action.microbatch] = position
            for _, peer in sends.get((action.stage, action.kind), ()):
                links[rank, homes[peer]].append((action, peer))
    busy_s = [_busy_s(actions, compute_s) for actions in schedule]
    slots: list[list[Slot]] = [[] for _ in schedule]
    for (src, dst), made in links.items():
        slots[dst] += _slots(src, made, readers, busy_s[dst], transfer_s)
    return [_in_order(rank, sorted(each), links) for rank, each in enumerate(slots)]


def _in_order(
    rank: int,
    slots: Sequence[Slot],
    links: Mapping[tuple[int, int], Sequence[tuple[Action, int]]],
) -> Iterator[tuple[int, Action]]:
    for slot, _, sender, number in slots:
        made, stage = links[sender, rank][number]
        yield slot, Action(stage, RECV[PHASE[made.kind]], made.microbatch, made.stage)


def _busy_s(
    actions: Sequence[Action], compute_s: Mapping[tuple[int, Kind], float] | None
) -> list[float]:
    """Before each computation, the seconds that its rank has computed so far; one for each
    computation where that is not known. Between two of them at least as many pass."""
    each = (1.0 if compute_s is None else compute_s[a.stage, a.kind] for a in actions)
    return list(accumulate(each, initial=0.0))


def _slots(
    src: int,
    made: Sequence[tuple[Action, int]],
    readers: Mapping[tuple[int, Kind], Mapping[int | None, int]],
    busy_s: Sequence[float],
    transfer_s: Mapping[tuple[int, int], float],
) -> Iterator[Slot]:
    """Of the receives of one link, the last first: each as late as it and those after it can be.

    Args:
        made: the computations whose values are sent, in order, and the stages that they go to.
    """
    slot = reader = len(busy_s)
    latest_s = math.inf
    for number in range(len(made) - 1, -1, -1):
        action, peer = made[number]
        read = readers[peer, action.kind].get(action.microbatch)
        if read is None:
            continue  # which the verifier refuses
        latest_s = min(latest_s, busy_s[read]) - transfer_s.get((action.stage, peer), 0.0)
        in_time = bisect_right(busy_s, latest_s) - 1
        slot = max(0, min(slot, read - 1, in_time))
        reader = min(reader, read)
        yield slot, reader, src, number


def _merged(
    actions: Sequence[Action], sends: Sends, receives: Iterator[tuple[int, Action]]
) -> Iterator[Action]:
    """A rank's list."""
    slot, receive = next(receives, NO_MORE)
    for position, action in enumerate(actions):
        while receive is not None and slot == position:
            yield receive
            slot, receive = next(receives, NO_MORE)
        yield action
        for kind, peer in sends.get((action.stage, action.kind), ()):
            yield Action(action.stage, kind, action.microbatch, peer)

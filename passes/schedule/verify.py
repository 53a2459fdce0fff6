"""What is legal for a schedule, whatever the programs are that run by it.

- Every stage is on one rank, and runs F of every microbatch once and in order, B (if it trains)
  after it, and W (if it has one) after that. Gradients add up in that order, bit for bit, and
  leave with the last one.
- Of stages on one rank, what makes a value runs before what reads it.
- Between ranks every message has one send and one receive. The send stands after the action that
  makes its values and before the next one of its stage and microbatch, which may be their last
  reader; sends to several stages stand in the order of these, after which values are dropped. The
  receive stands before the action that reads it.
- What one rank sends to another is received in the order in which it is sent, whichever stages it
  is between: on CUDA these messages share a communicator and its stream (`runtime.exchange`).
- No action waits, through others, for itself: `clock.run` runs all ranks to their ends under
  rendezvous sends, where a message gets through when both ends are posted and the one before it on
  its link is through. Sends that never block wait for less: they get to the end as well.

All of it is linear in the number of actions. An error says in a sentence what is wrong, and draws
the place (`fault`). What is held at once is in `limits`, what replicas exchange in `exchange`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import pairwise

from ...compiler.ir.actions import (
    COMPUTE,
    COMPUTE_OF,
    RECV,
    SEND,
    Action,
    Kind,
    Phase,
    Schedule,
    homes_of,
)
from ...compiler.ir.program import Message
from .clock import MAKES, READS, run
from .fault import FaultError, Place, drawn

NEXT = {Kind.F: Kind.B, Kind.B: Kind.W}
"""A computation -> the one of the same stage and microbatch that follows it, where there is one."""
NEEDS_A_PEER = {*MAKES, *READS}


def verify_schedule(
    schedule: Schedule,
    messages: Sequence[Message],
    microbatches: int,
    trains: bool,
    weights: Collection[int] | None = None,
) -> None:
    """A schedule with its sends and receives.

    Args:
        weights: the stages that run W; None for those that do.

    Raises:
        VerificationError: with the place, where it is not legal.
    """
    try:
        found = _Places(schedule)
        _check_computes(found, microbatches, trains, weights)
        _check_messages(found, messages, microbatches)
        _check_links(found)
        _check_no_cycle(schedule)
    except FaultError as fault:
        raise drawn(schedule, fault) from None


def verify_compute(
    schedule: Schedule,
    messages: Sequence[Message],
    microbatches: int,
    trains: bool,
    weights: Collection[int] | None = None,
) -> None:
    """What is said of computations alone, before there are sends and receives.

    Raises:
        VerificationError: with the place, where it is not legal.
    """
    try:
        found = _Places(schedule)
        _check_computes(found, microbatches, trains, weights)
        for message in _within_ranks(found, messages):
            _check_hand_over(found, message)
    except FaultError as fault:
        raise drawn(schedule, fault) from None


# -- one schedule, in order -----------------------------------------------------------------------


class _Places:
    """Where everything is, from one walk over a schedule.

    Attributes:
        homes: stage -> its rank.
        at: (stage, kind, peer) -> the microbatches, and the positions in the rank's list, in order.
        sent, received: (from rank, to rank) -> positions of the sends, or of the receives.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.homes = _homes(schedule)
        self.at: dict[tuple[int, Kind, int | None], tuple[list[int], list[int]]] = {}
        self.sent: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.received: dict[tuple[int, int], list[int]] = defaultdict(list)
        for rank, actions in enumerate(schedule):
            for index, action in enumerate(actions):
                self._add(rank, index, action)

    def _add(self, rank: int, index: int, action: Action) -> None:
        kind, peer, number = action.kind, action.peer, action.microbatch
        ends = kind in NEEDS_A_PEER
        if (peer is None) is ends:
            said = f"{action} names {'no' if ends else 'a'} stage to talk to"
            raise FaultError(said, (rank, index))
        if not ends and not kind.computes:
            return
        if number is None:
            raise FaultError(f"{action} names no microbatch", (rank, index))
        key = (action.stage, kind, peer)
        found = self.at.get(key)
        if found is None:
            found = self.at[key] = ([], [])
        found[0].append(number)
        found[1].append(index)
        if peer is None:
            return
        other = self.homes.get(peer, -1)
        if kind in MAKES:
            self.sent[rank, other].append(index)
        else:
            self.received[other, rank].append(index)

    def numbers(self, stage: int, kind: Kind, peer: int | None = None) -> list[int]:
        """Of the microbatches."""
        return self.at.get((stage, kind, peer), ([], []))[0]

    def positions(self, stage: int, kind: Kind, peer: int | None = None) -> list[int]:
        """By microbatch, of what is there once for each."""
        numbers, positions = self.at.get((stage, kind, peer), ([], []))
        return [index for _, index in sorted(zip(numbers, positions, strict=True))]

    def place(self, stage: int, index: int) -> Place:
        return self.homes[stage], index

    def odd_one(self, stage: int, kind: Kind, peer: int | None, expected: Sequence[int]) -> Place:
        """The first of these actions that is not of the microbatch expected there; where they are
        too few, the last, and where there is none, the rank's first action."""
        numbers, positions = self.at.get((stage, kind, peer), ([], []))
        for number, index, wanted in zip(numbers, positions, [*expected, None], strict=False):
            if number != wanted:
                return self.place(stage, index)
        return self.place(stage, positions[-1] if positions else 0)

    def first_last(self, message: Message) -> tuple[list[int], list[int]]:
        """Per microbatch, the positions of what makes a message and of what reads it."""
        kind = COMPUTE_OF[message.phase]
        return self.positions(message.src, kind), self.positions(message.dst, kind)


def _homes(schedule: Schedule) -> dict[int, int]:
    """Stage -> its rank; each stage has one, and their numbers have no gap."""
    homes = homes_of(schedule)
    for rank, actions in enumerate(schedule):
        if not actions:
            raise FaultError(f"rank {rank} has nothing to do")
        for index, action in enumerate(actions):
            if homes[action.stage] != rank:
                raise FaultError(
                    f"{action} is in the list of rank {rank}, and stage {action.stage} is on rank "
                    f"{homes[action.stage]}",
                    (rank, index),
                )
    if sorted(homes) != list(range(len(homes))):
        raise FaultError(f"only stages {sorted(homes)} have actions")
    return homes


def _check_computes(
    found: _Places, microbatches: int, trains: bool, weights: Collection[int] | None
) -> None:
    expected = list(range(microbatches))
    for stage in found.homes:
        for kind in COMPUTE:
            wanted = expected if trains or kind is Kind.F else []
            if kind is Kind.W and (weights is None or stage not in weights):
                wanted = expected if weights is None and found.numbers(stage, kind) else []
            numbers = found.numbers(stage, kind)
            if numbers != wanted:
                all_of_them = f"0 to {microbatches - 1}, each once and in order"
                raise FaultError(
                    f"stage {stage} runs {kind} of microbatches {_short(numbers, wanted)}, and "
                    f"should of {all_of_them if wanted else 'none'}",
                    found.odd_one(stage, kind, None, wanted),
                )
        for earlier, later in ((Kind.F, Kind.B), (Kind.B, Kind.W)):
            before, after = found.positions(stage, earlier), found.positions(stage, later)
            for i, (first, then) in enumerate(zip(before, after, strict=False)):
                if first > then:
                    raise FaultError(
                        f"{stage}{later}{i} comes before {stage}{earlier}{i}",
                        found.place(stage, then),
                    )


def _short(numbers: Sequence[int], wanted: Sequence[int]) -> str:
    """A list of microbatches, of a long one what is around the first that is not wanted there."""
    if len(numbers) <= 8:
        return str(list(numbers))
    pairs = zip(numbers, [*wanted, -1], strict=False)
    odd = next((i for i, (number, want) in enumerate(pairs) if number != want), len(numbers) - 1)
    first, last = max(odd - 2, 0), min(odd + 3, len(numbers))
    words = ["…"] * (first > 0) + [str(n) for n in numbers[first:last]]
    return f"[{', '.join(words + ['…'] * (last < len(numbers)))}]"


# -- messages -------------------------------------------------------------------------------------


def _within_ranks(found: _Places, messages: Sequence[Message]) -> list[Message]:
    """Those between stages of one rank."""
    for stage in (stage for message in messages for stage in (message.src, message.dst)):
        if stage not in found.homes:
            raise FaultError(f"stage {stage} has no actions")
    return [m for m in messages if found.homes[m.src] == found.homes[m.dst]]


def _check_messages(found: _Places, messages: Sequence[Message], microbatches: int) -> None:
    within = _within_ranks(found, messages)
    for message in within:
        _check_hand_over(found, message)
    between = [message for message in messages if message not in within]
    _check_no_stray(found, between)
    together: dict[tuple[int, Phase], list[int]] = defaultdict(list)
    for message in between:
        _check_pairs(found, message, microbatches)
        _check_sides(found, message)
        together[message.src, message.phase].append(message.dst)
    for (stage, phase), peers in together.items():
        for before, after in pairwise(sorted(peers)):
            _check_in_turn(found, stage, SEND[phase], before, after)


def _check_hand_over(found: _Places, message: Message) -> None:
    """Between stages of one rank, what makes a value runs before what reads it."""
    kind = COMPUTE_OF[message.phase]
    pairs = zip(*found.first_last(message), strict=True)
    for i, (made, read) in enumerate(pairs):
        if made > read:
            raise FaultError(
                f"{Action(message.dst, kind, i)} reads what {Action(message.src, kind, i)} makes "
                f"after it",
                found.place(message.dst, read),
            )


def _check_no_stray(found: _Places, messages: Sequence[Message]) -> None:
    known = {(m.src, SEND[m.phase], m.dst) for m in messages}
    known |= {(m.dst, RECV[m.phase], m.src) for m in messages}
    for (stage, kind, peer), ends in found.at.items():
        if peer is not None and (stage, kind, peer) not in known:
            action = Action(stage, kind, ends[0][0], peer)
            raise FaultError(f"{action} has no message", found.place(stage, ends[1][0]))


def _check_pairs(found: _Places, message: Message, microbatches: int) -> None:
    """One send and one receive for every microbatch, in the same order."""
    src, dst, phase = message.src, message.dst, message.phase
    send, receive = (src, SEND[phase], dst), (dst, RECV[phase], src)
    sent, received = found.numbers(*send), found.numbers(*receive)
    expected = list(range(microbatches))
    if sorted(sent) != expected:
        raise FaultError(
            f"{src}→{dst} {phase}: microbatches {_short(sent, expected)} are sent, and there are "
            f"{microbatches}",
            found.odd_one(*send, expected),
        )
    if sent != received:
        raise FaultError(
            f"{src}→{dst} {phase}: sent in order {_short(sent, received)}, received "
            f"{_short(received, sent)}",
            found.odd_one(*receive, sent),
            found.odd_one(*send, received),
        )


def _check_sides(found: _Places, message: Message) -> None:
    """A send stands between what makes its values and the next part of the same microbatch; a
    receive before what reads it."""
    src, dst, phase = message.src, message.dst, message.phase
    kind = COMPUTE_OF[phase]
    made, read = found.first_last(message)
    sends = found.positions(src, SEND[phase], dst)
    receives = found.positions(dst, RECV[phase], src)
    later = found.positions(src, NEXT[kind]) or [len(found.schedule[found.homes[src]])] * len(sends)
    for i, at in enumerate(sends):
        action = Action(src, SEND[phase], i, dst)
        if at < made[i]:
            said = f"{action} is on the wrong side of {Action(src, kind, i)}, which makes it"
            raise FaultError(said, found.place(src, at))
        if at > later[i]:
            said = f"{action} is on the wrong side of {Action(src, NEXT[kind], i)}, which may"
            raise FaultError(f"{said} be the last to read the same values", found.place(src, at))
    for i, at in enumerate(receives):
        if at > read[i]:
            action = Action(dst, RECV[phase], i, src)
            said = f"{action} is on the wrong side of {Action(dst, kind, i)}, which reads it"
            raise FaultError(said, found.place(dst, at))


def _check_in_turn(found: _Places, stage: int, send: Kind, before: int, after: int) -> None:
    """A computation's values leave in the order of the stages to which they are sent."""
    pairs = zip(
        found.positions(stage, send, before), found.positions(stage, send, after), strict=True
    )
    for i, (first, then) in enumerate(pairs):
        if first > then:
            action = Action(stage, send, i, after)
            said = f"{action} comes before {Action(stage, send, i, before)}, and values are dropped"
            raise FaultError(f"{said} after the last stage", found.place(stage, then))


def _check_links(found: _Places) -> None:
    """Two ranks agree on the order of all that one of them sends to the other."""
    for (src, dst), sent in found.sent.items():
        for here, there in zip(sent, found.received[src, dst], strict=True):
            send, receive = found.schedule[src][here], found.schedule[dst][there]
            ends = (receive.peer, receive.stage, receive.microbatch, READS[receive.kind])
            if (send.stage, send.peer, send.microbatch, MAKES[send.kind]) != ends:
                said = f"{receive} is posted where {send} is next from rank {src} to rank {dst}"
                raise FaultError(said, (dst, there), (src, here))


def _check_no_cycle(schedule: Schedule) -> None:
    """Every rank gets to its end."""
    stuck = {each.rank: each for each in run(schedule).stuck}
    if not stuck:
        return
    rank, seen = min(stuck), []
    while rank not in seen:
        seen.append(rank)
        rank = stuck[rank].waits_for
    cycle = [stuck[r] for r in seen[seen.index(rank) :]]
    steps = [f"{schedule[s.rank][s.index]} waits for rank {s.waits_for}" for s in cycle]
    places = [(s.rank, s.index) for s in cycle]
    raise FaultError(f"a wait cycle: {', '.join(steps)}", *places)

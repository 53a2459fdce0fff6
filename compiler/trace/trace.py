"""A trace: what ranks do in time, as data; a planned one and a measured one look alike.

===============  ==============================================================================
lane             what stands in it
===============  ==============================================================================
`COMPUTE`        the actions that run a program: ``2F0``, ``2B0``, ``2W0``
`COMMUNICATION`  ``1SEND_F0→2``: planned, while the message is under way; measured, while it is
                 handed to the network. ``2RECV_F0←1``: while a computation waits for it, and for
                 it alone; of no length where it had come
`CLOSING`        what replicas exchange, tied gradients, clipping, the optimizer
`STEP`           one range per step, and per evaluation
===============  ==============================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from ..costs.topology import ORDERS, Numbering
from ..ir.actions import RECV, SEND, Action

TRACE_VERSION = 1
STEP = "step"
"""How the names of ranges begin that are training steps: ``step 0``."""


class Lane(StrEnum):
    """A thread of a rank, as it is drawn."""

    STEP = "step"
    COMPUTE = "compute"
    COMMUNICATION = "communication"
    CLOSING = "replicas and optimizer"


class Origin(StrEnum):
    """Where a trace is from."""

    PLANNED = "planned"
    MEASURED = "measured"


@dataclass(frozen=True)
class Span:
    """Something that takes time.

    Attributes:
        rank: of the run.
        name: of an action, or of what else happens.
        step: the number of the range that it is in.
        start_s, end_s: from the start of the trace.
        nbytes: of a message; 0 where that is not known.
    """

    rank: int
    lane: Lane
    name: str
    step: int
    start_s: float
    end_s: float
    nbytes: int = 0

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def action(self) -> Action | None:
        """The action that it is; None for what is none, such as the optimizer."""
        return action_of(self.name)


@dataclass(frozen=True)
class Held:
    """The bytes that a rank holds from a moment on."""

    rank: int
    at_s: float
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a trace is of.

    Attributes:
        device, costs: what planned seconds are of, as in `Plan`; in a measured trace those of the
            plan that ran.
        digest: of the computations of each rank, in order: equal for equal schedules.
        placement: per rank of a replica, its stages.
        step_s, bubble: of the plan.
        memory: what the bytes are: "predicted", "torch.cuda.memory_allocated", "not measured".
        clocks: how the ranks' clocks were brought together.
        shared_thread: one process has played all ranks, one after another: their seconds of
            waiting say nothing.
        complete: False where a step has failed, or a rank's part is missing.
        started_ns: when the trace starts, in nanoseconds since 1970; 0 of a planned one.
        order: of the ranks of several replicas (`Numbering`).
    """

    origin: str
    model: str
    device: str
    costs: str
    schedule: str
    digest: str
    microbatches: int
    dp: int
    placement: tuple[tuple[int, ...], ...]
    step_s: float
    bubble: float
    budget_bytes: int | None
    memory: str
    clocks: str
    shared_thread: bool = False
    complete: bool = True
    started_ns: int = 0
    version: int = TRACE_VERSION
    order: str = ORDERS[0]

    @property
    def numbering(self) -> Numbering:
        return Numbering(self.pp, self.dp, self.order)

    @property
    def pp(self) -> int:
        """How many ranks a replica has."""
        return len(self.placement)

    @property
    def n_stages(self) -> int:
        return sum(map(len, self.placement))

    def label(self, rank: int) -> str:
        """A rank's name: ``rank 3: stages 1, 4``."""
        stages = self.placement[self.numbering.position_of(rank)]
        noun = "stage" if len(stages) == 1 else "stages"
        return f"rank {rank}: {noun} {', '.join(map(str, stages))}"


@dataclass(frozen=True)
class Trace:
    """Spans and bytes of ranks.

    Attributes:
        ranks: those that it has, in order. A planned trace has one replica's.
    """

    header: Header
    ranks: tuple[int, ...]
    spans: tuple[Span, ...]
    held: tuple[Held, ...] = ()

    @property
    def origin(self) -> Origin:
        return Origin(self.header.origin)

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of the training steps."""
        ranges = (span for span in self.spans if span.lane is Lane.STEP)
        return tuple(sorted({span.step for span in ranges if span.name.startswith(STEP)}))

    def of(self, lane: Lane) -> Iterator[Span]:
        return (span for span in self.spans if span.lane is lane)


@dataclass(frozen=True)
class Message:
    """A send and the receive that it belongs to."""

    send: Span
    receive: Span


def messages_of(trace: Trace) -> tuple[Message, ...]:
    """The messages both ends of which are in a trace."""
    sent: dict[tuple[int, int, Action], Span] = {}
    for span in trace.of(Lane.COMMUNICATION):
        action = span.action
        if action is not None and action.kind in SEND.values():
            sent[span.step, span.rank // trace.header.pp, action] = span
    found = []
    for span in trace.of(Lane.COMMUNICATION):
        action = span.action
        if action is not None and action.kind in RECV.values():
            send = sent.get((span.step, span.rank // trace.header.pp, sender_of(action)))
            if send is not None:
                found.append(Message(send, span))
    return tuple(found)


def sender_of(receive: Action) -> Action:
    """The other end: ``2RECV_F0←1`` -> ``1SEND_F0→2``."""
    assert receive.peer is not None
    kind = SEND[receive.kind.phase]
    return Action(receive.peer, kind, receive.microbatch, receive.stage)


def digest_of(schedule: Iterable[Iterable[Action]]) -> str:
    """Of the computations of each rank in order."""
    lines = (" ".join(str(a) for a in actions if a.kind.computes) for actions in schedule)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@lru_cache(1 << 16)
def action_of(name: str) -> Action | None:
    try:
        return Action.parse(name)
    except ValueError:
        return None

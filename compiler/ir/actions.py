"""Actions: the instructions of a schedule, as data that prints and parses.

A schedule is a list of actions per rank of a replica, the same in every replica. An action names
its stage, for a rank may hold several: ``2F0`` is stage 2's forward of microbatch 0,
``1SEND_B3→0`` sends what stage 1's backward of microbatch 3 owes stage 0, ``0RECV_B3←1`` is the
other end, ``2REDUCE_GRAD`` averages stage 2's gradients over the replicas. Where these divide
parameters and gradients (`passes.schedule.exchange`), ``2UNSHARD`` makes the parameters whole, and
``2REDUCE_B0`` averages what the backward of microbatch 0 made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Whether something belongs to the model or to its derivative."""

    FORWARD = "forward"
    BACKWARD = "backward"

    __hash__ = str.__hash__


class Kind(StrEnum):
    """What an action does."""

    F = "F"
    B = "B"
    W = "W"  # the weight gradients that no other stage waits for, where they are split off
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    SYNC_TIED = "SYNC_TIED"
    UNSHARD = "UNSHARD"
    REDUCE_B = "REDUCE_B"
    REDUCE_W = "REDUCE_W"
    REDUCE_GRAD = "REDUCE_GRAD"

    computes: bool
    """Whether it runs a program of its stage."""
    phase: Phase

    def __init__(self, value: str):
        self.computes = value in ("F", "B", "W")
        self.phase = Phase.FORWARD if value.endswith("F") else Phase.BACKWARD

    __hash__ = str.__hash__  # Enum's own is Python, and is asked for with every action


COMPUTE = (Kind.F, Kind.B, Kind.W)
COMPUTE_OF = {Phase.FORWARD: Kind.F, Phase.BACKWARD: Kind.B}
"""The computation that makes, and the one that reads, the messages of a phase."""
SEND = {Phase.FORWARD: Kind.SEND_F, Phase.BACKWARD: Kind.SEND_B}
RECV = {Phase.FORWARD: Kind.RECV_F, Phase.BACKWARD: Kind.RECV_B}
_PATTERN = re.compile(
    r"(?P<stage>\d+)(?P<kind>SYNC_TIED|UNSHARD|REDUCE_GRAD|REDUCE_[BW]|(?:SEND_|RECV_)?[FB]|W)"
    r"(?P<microbatch>\d+)?(?:(?P<arrow>[→←])(?P<peer>\d+))?"
)


@dataclass(frozen=True, order=True)
class Action:
    """One instruction of one stage; ``peer`` is the other stage of a send or receive."""

    stage: int
    kind: Kind
    microbatch: int | None = None
    peer: int | None = None

    def __str__(self) -> str:
        number = "" if self.microbatch is None else str(self.microbatch)
        arrow = "←" if self.kind in RECV.values() else "→"
        peer = "" if self.peer is None else f"{arrow}{self.peer}"
        return f"{self.stage}{self.kind}{number}{peer}"

    @staticmethod
    def parse(text: str) -> Action:
        """The action that prints as ``text``.

        Raises:
            ValueError: the text is not an action.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not an action like 2F0 or 1SEND_B3→0")
        number, peer = match["microbatch"], match["peer"]
        action = Action(
            int(match["stage"]),
            Kind(match["kind"]),
            None if number is None else int(number),
            None if peer is None else int(peer),
        )
        if str(action) != text.strip():
            raise ValueError(f"{text!r} is not an action; did you mean {action}?")
        return action


Schedule = tuple[tuple[Action, ...], ...]
"""Per rank of a replica, its actions in order."""


@dataclass(frozen=True)
class Pace:
    """How the first graph of a model runs: what its others, which may share a step, do alike.

    Attributes:
        order: its compute actions.
        compute_s, transfer_s: its seconds, by which receives are posted.
    """

    order: Schedule
    compute_s: Mapping[tuple[int, Kind], float]
    transfer_s: Mapping[tuple[int, int], float]


def homes_of(schedule: Schedule) -> dict[int, int]:
    """Stage -> the rank of a replica that holds it, in the order of the ranks."""
    return {action.stage: rank for rank, actions in enumerate(schedule) for action in actions}


def placement_of(homes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Per rank its stages, in order, from the rank of each stage."""
    found: list[list[int]] = [[] for _ in range(max(homes, default=-1) + 1)]
    for stage, rank in enumerate(homes):
        found[rank].append(stage)
    return tuple(map(tuple, found))


def to_text(schedule: Schedule) -> str:
    """One line per rank."""
    return "\n".join(" ".join(str(action) for action in actions) for actions in schedule)


def from_text(text: str) -> Schedule:
    return tuple(tuple(Action.parse(word) for word in line.split()) for line in text.splitlines())


def compute_only(schedule: Schedule) -> Schedule:
    """Without what follows from it: sends, receives and exchanges."""
    return tuple(tuple(a for a in actions if a.kind.computes) for actions in schedule)


def max_in_flight(actions: Iterable[Action], stage: int) -> int:
    """The most microbatches that a stage holds between forward and its last backward at once."""
    actions = [action for action in actions if action.stage == stage]
    last = Kind.W if any(action.kind is Kind.W for action in actions) else Kind.B
    most = now = 0
    for action in actions:
        now += {Kind.F: 1, last: -1}.get(action.kind, 0)
        most = max(most, now)
    return most


def slots_of(actions: Iterable[Action], stage: int) -> dict[int, int]:
    """Microbatch -> the lowest number that no other one has at the time, which is from the first
    action of the stage for a microbatch to the last. Receives are posted early and do not count.
    """
    posted = RECV.values()
    mine = [a for a in actions if a.stage == stage and a.microbatch is not None]
    mine = [action for action in mine if action.kind not in posted]
    last = {action.microbatch: i for i, action in enumerate(mine)}
    numbers: dict[int, int] = {}
    busy: set[int] = set()
    for i, action in enumerate(mine):
        index = action.microbatch
        assert index is not None
        if index not in numbers:
            numbers[index] = next(n for n in range(len(busy) + 1) if n not in busy)
            busy.add(numbers[index])
        if last[index] == i:
            busy.discard(numbers[index])
    return numbers

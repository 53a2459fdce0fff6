"""Schedules carried out value by value, one action at a time: a slow judge of what is legal.

It knows nothing of the verifier's rules. A stage and microbatch has an environment of values; a
program that finds a value missing, or one of another message, fails, and so does a rank that never
gets to its end, gradients that add up in another order, and a message that nobody reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from pipecompile.compiler.ir.actions import Action, Kind, Phase, Schedule
from pipecompile.compiler.ir.program import Message

Value = tuple[int, Phase, int]
"""The stage that made it, whether in its forward or its backward, and the microbatch."""
Letter = tuple[Value, int]
"""A value, and the stage that it is sent to: each gets a message of its own."""

FORWARD, BACKWARD = Phase.FORWARD, Phase.BACKWARD


class IllegalError(Exception):
    """Something went wrong."""


@dataclass(frozen=True)
class World:
    """What a schedule is for.

    Attributes:
        weights: the stages that run W.
        keeps: whether the next part of a microbatch reads what was sent, and is the last to do so;
            else nothing reads it but its receivers, and the last send drops it.
        rendezvous: whether all that one rank sends to another goes one after the other, and only
            when both ends are posted; else each pair of stages has a channel, and sends are eager.
    """

    n_stages: int
    messages: Sequence[Message]
    microbatches: int
    trains: bool
    weights: Collection[int]
    keeps: bool
    rendezvous: bool

    def parts(self, stage: int) -> list[Kind]:
        parts = [Kind.F, Kind.B] if self.trains else [Kind.F]
        return [*parts, Kind.W] if stage in self.weights else parts


def is_legal(
    schedule: Schedule,
    n_stages: int,
    messages: Sequence[Message],
    microbatches: int,
    trains: bool,
    weights: Collection[int],
) -> bool:
    """Whether all programs with these messages run by it, however they are sent."""
    try:
        for keeps in (True, False):
            for rendezvous in (True, False):
                world = World(n_stages, messages, microbatches, trains, weights, keeps, rendezvous)
                Play(schedule, world).run()
    except IllegalError:
        return False
    return True


@dataclass
class Pipe:
    """Where messages go through in order."""

    sent: list[Letter] = field(default_factory=list)
    posted: int = 0

    def through(self, rendezvous: bool) -> int:
        return min(len(self.sent), self.posted) if rendezvous else len(self.sent)


class Play:
    """All ranks, in turn."""

    def __init__(self, schedule: Schedule, world: World):
        self.schedule, self.world = schedule, world
        self.homes: dict[int, int] = {}
        for rank, actions in enumerate(schedule):
            require(len(actions) > 0)
            for action in actions:
                require(self.homes.setdefault(action.stage, rank) == rank)
        require(set(self.homes) == set(range(world.n_stages)))
        self.values: dict[tuple[int, int], set[Value]] = defaultdict(set)
        self.pipes: dict[tuple[int, ...], Pipe] = defaultdict(Pipe)
        # what a computation has to wait for: a pipe, a place in it, and the value it should bring
        self.awaited: dict[tuple[int, Kind, int], list[tuple[Pipe, int, Value]]] = defaultdict(list)
        self.order: dict[tuple[int, Kind], list[int]] = defaultdict(list)

    def run(self) -> None:
        ranks = [self._rank(actions) for actions in self.schedule]
        while ranks:
            before = self._state()
            waiting = [rank for rank in ranks if next(rank, self) is None]
            require(len(waiting) < len(ranks) or self._state() != before)
            ranks = waiting
        everyone = list(range(self.world.microbatches))
        for stage in self.homes:
            for kind in (Kind.F, Kind.B, Kind.W):
                parts = self.world.parts(stage)
                require(self.order[stage, kind] == (everyone if kind in parts else []))
        require(not self.awaited)
        require(all(pipe.posted == len(pipe.sent) for pipe in self.pipes.values()))

    def _state(self) -> int:
        """How much has happened."""
        posted = sum(len(pipe.sent) + pipe.posted for pipe in self.pipes.values())
        return sum(map(len, self.order.values())) + posted

    def _rank(self, actions: Sequence[Action]) -> Iterator[None]:
        for action in actions:
            require(action.microbatch is not None)
            assert action.microbatch is not None
            if action.kind in (Kind.F, Kind.B, Kind.W):
                require(action.peer is None)
                awaited = self.awaited.pop((action.stage, action.kind, action.microbatch), [])
                for pipe, place, value in awaited:
                    while pipe.through(self.world.rendezvous) <= place:
                        yield
                    require(pipe.sent[place] == (value, action.stage))
                    self.values[action.stage, action.microbatch].add(value)
                self._compute(action.stage, action.kind, action.microbatch)
            elif action.kind in (Kind.SEND_F, Kind.SEND_B):
                self._send(action, action.microbatch)
            else:
                self._receive(action, action.microbatch)

    def _messages(self, **ends: int) -> list[Message]:
        return [m for m in self.world.messages if all(getattr(m, k) == v for k, v in ends.items())]

    def _compute(self, stage: int, kind: Kind, i: int) -> None:
        parts, here = self.world.parts(stage), self.values[stage, i]
        require(kind in parts)
        require(
            [self.order[stage, part].count(i) for part in parts]
            == [int(parts.index(part) < parts.index(kind)) for part in parts]
        )
        self.order[stage, kind].append(i)
        if kind is Kind.W:
            self._let_go(stage, BACKWARD, i)
            return
        phase = FORWARD if kind is Kind.F else BACKWARD
        for message in self._messages(dst=stage):
            if message.phase is phase:
                require((message.src, phase, i) in here)
        if kind is Kind.B:
            self._let_go(stage, FORWARD, i)
        here.add((stage, phase, i))
        for message in self._messages(src=stage):
            if message.phase is phase and self.homes[message.dst] == self.homes[stage]:
                self.values[message.dst, i].add((stage, phase, i))

    def _let_go(self, stage: int, phase: Phase, i: int) -> None:
        if self.world.keeps:
            self.values[stage, i].discard((stage, phase, i))

    def _send(self, action: Action, i: int) -> None:
        phase = FORWARD if action.kind is Kind.SEND_F else BACKWARD
        require(action.peer is not None)
        assert action.peer is not None
        mine = [m for m in self._messages(src=action.stage) if m.phase is phase]
        mine = [m for m in mine if self.homes[m.dst] != self.homes[m.src]]
        require(action.peer in [m.dst for m in mine])
        value = (action.stage, phase, i)
        require(value in self.values[action.stage, i])
        last = action.peer == max(m.dst for m in mine)
        parts = self.world.parts(action.stage)
        read_later = parts[-1] is not (Kind.F if phase is FORWARD else Kind.B)
        if last and not (self.world.keeps and read_later):
            self.values[action.stage, i].discard(value)
        self._pipe(action.stage, action.peer).sent.append((value, action.peer))

    def _receive(self, action: Action, i: int) -> None:
        kind = Kind.F if action.kind is Kind.RECV_F else Kind.B
        phase = FORWARD if kind is Kind.F else BACKWARD
        require(action.peer is not None)
        assert action.peer is not None
        senders = [m.src for m in self._messages(dst=action.stage) if m.phase is phase]
        require(action.peer in senders)
        require(self.homes[action.peer] != self.homes[action.stage])
        pipe = self._pipe(action.peer, action.stage)
        value = (action.peer, phase, i)
        self.awaited[action.stage, kind, i].append((pipe, pipe.posted, value))
        pipe.posted += 1

    def _pipe(self, src: int, dst: int) -> Pipe:
        ends = (self.homes[src], self.homes[dst])
        return self.pipes[ends if self.world.rendezvous else (*ends, src, dst)]


def require(condition: bool) -> None:
    if not condition:
        raise IllegalError

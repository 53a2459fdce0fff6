"""A measured step once more, by the simulator: does the schedule explain the bubble?

Not only computations are as long as they were measured, but also what ranks spend on sends and
between actions, and what messages are under way that a rank has waited for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from ...passes.schedule.communication import add_communication
from ...passes.schedule.simulate import simulate
from ..ir.actions import SEND, Action, Kind, Phase, Schedule
from ..ir.program import Message
from .figures import steps_of
from .trace import Lane, Origin, Span, Trace, messages_of

WAITED_S = 2e-4  # a receive that takes longer was waited for: it ends when the message arrives

Ends = tuple[int, int]
"""Stages that a message goes from and to."""


def resimulated_bubble(planned: Trace, measured: Trace) -> float:
    """The bubble of a planned trace's schedule at the seconds of a measured one; the median over
    steps and replicas. Messages that nobody has waited for are under way as long as was planned,
    or as they were, if that is less.

    The simulator knows one duration per stage and kind: to it, the microbatches of a stage are
    stages of their own, as all messages are between computations of one microbatch.
    """
    m, numbering = planned.header.microbatches, measured.header.numbering
    schedule = tuple(tuple(_apart(a, m) for a in row) for row in _schedule(planned))
    happened = measured.header.origin != Origin.PLANNED  # a plan has no time between actions
    planned_s = {
        _ends(_apart(sent, m)): span.seconds
        for span in planned.of(Lane.COMMUNICATION)
        if (sent := span.action) is not None and sent.kind in SEND.values()
    }
    under_way_s = _under_way(measured, planned_s, m) if happened else {}
    found = []
    for step, spans in steps_of(measured, measured.spans).items():
        replicas: dict[int, _Replayed] = defaultdict(_Replayed)
        for rank in measured.ranks:
            mine = [span for span in spans if span.rank == rank and span.action is not None]
            mine_of = replicas[numbering.replica_of(rank)]
            mine_of.add(sorted(mine, key=lambda s: (s.start_s, s.end_s)), m, happened)
        for replica, each in replicas.items():
            transfer_s = {**planned_s, **under_way_s.get((step, replica), {})}
            timeline = simulate(schedule, each.computed, transfer_s, send_s=each.sent)
            found.append(1 - each.busy_s / (timeline.makespan_s * len(schedule)))
    return median(found)


@dataclass
class _Replayed:
    """What one replica has done in a step.

    Attributes:
        computed, sent: seconds, with those since the action before.
        busy_s: of all computations, without.
    """

    computed: dict[tuple[int, Kind], float] = field(default_factory=dict)
    sent: dict[Ends, float] = field(default_factory=dict)
    busy_s: float = 0.0

    def add(self, spans: Iterable[Span], microbatches: int, happened: bool) -> None:
        """One rank's, in time."""
        end_s, between_s = None, 0.0
        for span in spans:
            action = span.action
            if happened and end_s is not None:
                between_s += max(span.start_s - end_s, 0.0)
            end_s = max(end_s or 0.0, span.end_s)
            if action is None or action.microbatch is None:
                continue
            apart = _apart(action, microbatches)
            if span.lane is Lane.COMPUTE:
                self.busy_s += span.seconds
                self.computed[apart.stage, action.kind] = span.seconds + between_s
            elif happened and action.kind in SEND.values():
                self.sent[_ends(apart)] = span.seconds + between_s
            else:
                continue
            between_s = 0.0


def _under_way(
    measured: Trace, planned_s: dict[Ends, float], microbatches: int
) -> dict[tuple[int, int], dict[Ends, float]]:
    """By step and replica, seconds from the begin of each send until its message was there.

    A message that was waited for came when its receive ended. One that was not may have come at any
    time before.
    """
    found: dict[tuple[int, int], dict[Ends, float]] = defaultdict(dict)
    for message in messages_of(measured):
        sent, receive = message.send, message.receive
        if sent.action is None:
            continue
        ends = _ends(_apart(sent.action, microbatches))
        seconds = max(receive.end_s - sent.start_s, 0.0)
        if receive.seconds <= WAITED_S:
            seconds = min(seconds, planned_s.get(ends, 0.0))
        replica = measured.header.numbering.replica_of(sent.rank)
        found[sent.step, replica][ends] = seconds
    return found


def _ends(send: Action) -> Ends:
    assert send.peer is not None
    return send.stage, send.peer


def _apart(action: Action, microbatches: int) -> Action:
    """The same with a stage of its own for each microbatch."""
    assert action.microbatch is not None
    i, peer = action.microbatch, action.peer
    other = None if peer is None else peer * microbatches + i
    return Action(action.stage * microbatches + i, action.kind, 0, other)


def _schedule(planned: Trace) -> Schedule:
    """What ranks compute, with the messages that the trace has."""
    computes: dict[int, list[Action]] = defaultdict(list)
    messages: dict[tuple[int, int, Phase], None] = {}
    for span in sorted(planned.spans, key=lambda span: span.start_s):
        if (action := span.action) is not None:
            if action.kind.computes:
                computes[span.rank].append(action)
            elif action.kind in SEND.values() and action.peer is not None:
                messages[action.stage, action.peer, action.kind.phase] = None
    order = tuple(tuple(computes[rank]) for rank in planned.ranks)
    return add_communication(order, [Message(*each, ()) for each in messages])

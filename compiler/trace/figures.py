"""What a trace says in numbers: medians over its steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

from ...passes.schedule.communication import add_communication
from ...passes.schedule.simulate import simulate
from ..ir.actions import RECV, SEND, Action, Kind, Phase, Schedule
from ..ir.program import Message
from .trace import Lane, Origin, Span, Trace


def compute_seconds(trace: Trace) -> dict[tuple[int, Kind], float]:
    """(stage, kind) -> seconds of one microbatch: the median over microbatches, replicas, steps."""
    found: dict[tuple[int, Kind], list[float]] = defaultdict(list)
    for _, spans in _by_step(trace, Lane.COMPUTE):
        for span in spans:
            if (action := span.action) is not None:
                found[action.stage, action.kind].append(span.seconds)
    return {key: median(seconds) for key, seconds in sorted(found.items())}


def step_seconds(trace: Trace) -> float:
    """From the first thing that any rank does in a step to the last."""
    return median(
        max(s.end_s for s in spans) - min(s.start_s for s in spans)
        for spans in _steps(trace, trace.spans).values()
    )


def bubble_of(trace: Trace) -> float:
    """The share of the ranks' time in which nothing is computed, as `Timeline.bubble` has it; the
    median over steps and replicas."""
    found = []
    for _, spans in _by_step(trace, Lane.COMPUTE):
        replicas: dict[int, dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))
        for span in spans:
            replicas[span.rank // trace.header.pp][span.rank].append(span)
        for rows in replicas.values():
            lengths = (max(s.end_s for s in r) - min(s.start_s for s in r) for r in rows.values())
            whole = max(lengths) * len(rows)
            busy = sum(span.seconds for row in rows.values() for span in row)
            found.append(1 - busy / whole if whole else 0.0)
    return median(found)


def waiting(trace: Trace) -> dict[tuple[int, int], float]:
    """(rank, another of its replica) -> seconds per step in which the one computes nothing and
    waits for a message of the other.

    Messages of one computation are waited for one after another, so that each wait is due to the
    one that ends it.
    """
    steps = trace.steps
    found: dict[tuple[int, int], dict[int, float]] = defaultdict(lambda: dict.fromkeys(steps, 0.0))
    homes = {s: rank for rank, stages in enumerate(trace.header.placement) for s in stages}
    for step, spans in _by_step(trace, Lane.COMMUNICATION):
        for span in spans:
            action = span.action
            if action is not None and action.kind in RECV.values() and action.peer is not None:
                first = span.rank - span.rank % trace.header.pp
                found[span.rank, first + homes[action.peer]][step] += span.seconds
    return {pair: median(seconds.values()) for pair, seconds in sorted(found.items())}


def sending(measured: Trace) -> dict[int, float]:
    """Rank -> seconds per step in which it hands messages over and computes nothing."""
    found: dict[int, list[float]] = defaultdict(list)
    for _, spans in _by_step(measured, Lane.COMMUNICATION):
        for rank in measured.ranks:
            mine = (span for span in spans if span.rank == rank)
            sends = (s for s in mine if s.action is not None and s.action.kind in SEND.values())
            found[rank].append(sum(span.seconds for span in sends))
    return {rank: median(seconds) for rank, seconds in found.items()}


def closing_seconds(trace: Trace) -> float:
    """What a step takes after the last computation of any rank."""
    found = []
    for spans in _steps(trace, trace.spans).values():
        computed = max(s.end_s for s in spans if s.lane is Lane.COMPUTE)
        found.append(max(s.end_s for s in spans) - computed)
    return median(found)


def resimulated_bubble(planned: Trace, measured: Trace) -> float:
    """The bubble of a planned trace's schedule and transfers, were each computation, and each send
    for its rank, as long as it was measured; the median over steps and replicas.

    The simulator knows one duration per stage and kind: to it, the microbatches of a stage are
    stages of their own, as all messages are between computations of one microbatch.
    """
    m, pp = planned.header.microbatches, planned.header.pp
    transfer_s: dict[tuple[int, int], float] = {}
    for span in planned.of(Lane.COMMUNICATION):
        sent = span.action
        if sent is not None and sent.kind in SEND.values():
            apart = _apart(sent, m)
            assert apart.peer is not None
            transfer_s[apart.stage, apart.peer] = span.seconds
    schedule = tuple(tuple(_apart(a, m) for a in row) for row in _schedule(planned))
    happened = measured.header.origin != Origin.PLANNED  # there, spans of sends are their way
    found = []
    for spans in _steps(measured, measured.spans).values():
        computed: dict[int, dict[tuple[int, Kind], float]] = defaultdict(dict)
        sent_s: dict[int, dict[tuple[int, int], float]] = defaultdict(dict)
        for span in spans:
            action, replica = span.action, span.rank // pp
            if action is None or action.microbatch is None:
                continue
            apart = _apart(action, m)
            if span.lane is Lane.COMPUTE:
                computed[replica][apart.stage, action.kind] = span.seconds
            elif happened and action.kind in SEND.values() and apart.peer is not None:
                sent_s[replica][apart.stage, apart.peer] = span.seconds
        found += [
            simulate(schedule, each, transfer_s, send_s=sent_s[replica]).bubble
            for replica, each in computed.items()
        ]
    return median(found)


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


def _by_step(trace: Trace, lane: Lane) -> Iterable[tuple[int, list[Span]]]:
    return _steps(trace, trace.of(lane)).items()


def _steps(trace: Trace, spans: Iterable[Span]) -> dict[int, list[Span]]:
    """Those of training steps, by step."""
    found: dict[int, list[Span]] = {step: [] for step in trace.steps}
    for span in spans:
        if span.step in found:
            found[span.step].append(span)
    return {step: members for step, members in found.items() if members}

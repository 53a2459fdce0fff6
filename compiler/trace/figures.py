"""What a trace says in numbers: medians over its steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

from ..ir.actions import RECV, SEND, Kind
from .trace import Lane, Span, Trace


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
        for spans in steps_of(trace, trace.spans).values()
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
    for spans in steps_of(trace, trace.spans).values():
        computed = max(s.end_s for s in spans if s.lane is Lane.COMPUTE)
        found.append(max(s.end_s for s in spans) - computed)
    return median(found)


def _by_step(trace: Trace, lane: Lane) -> Iterable[tuple[int, list[Span]]]:
    return steps_of(trace, trace.of(lane)).items()


def steps_of(trace: Trace, spans: Iterable[Span]) -> dict[int, list[Span]]:
    """Those of training steps, by step."""
    found: dict[int, list[Span]] = {step: [] for step in trace.steps}
    for span in spans:
        if span.step in found:
            found[span.step].append(span)
    return {step: members for step, members in found.items() if members}

"""A plan and its simulated step as a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...passes.schedule.simulate import Timeline
from ..costs.topology import ORDERS
from ..ir.actions import COMPUTE_OF, RECV, Action, Schedule, from_text, homes_of, placement_of
from ..plan.plan import Plan
from .trace import (
    STEP,
    Header,
    Held,
    Lane,
    Origin,
    Span,
    Trace,
    digest_of,
    sender_of,
)


@dataclass(frozen=True)
class Transit:
    """A message under way; ``receive`` is its other end."""

    receive: Action
    start_s: float
    end_s: float
    nbytes: int


def planned_trace(plan: Plan, timeline: Timeline) -> Trace:
    """One step of one replica."""
    schedule = from_text("\n".join(plan.schedule))
    spans = [
        *_computing(timeline),
        *_messages(schedule, timeline, tuple(_transits(plan, schedule, timeline))),
        *_closing(timeline),
    ]
    held = [
        Held(rank, interval.end_s, interval.held_bytes)
        for rank, row in enumerate(timeline.ranks)
        for interval in row
        if interval.held_bytes
    ]
    ranks = tuple(range(len(timeline.ranks)))
    ranges = [Span(rank, Lane.STEP, f"{STEP} 0", 0, 0.0, timeline.step_s) for rank in ranks]
    header = header_of(plan, schedule, Origin.PLANNED, "predicted", "simulated")
    return Trace(header, ranks, tuple(ranges + spans), tuple(held))


def header_of(plan: Plan, schedule: Schedule, origin: Origin, memory: str, clocks: str) -> Header:
    """What a trace of a plan, or of its run, is of."""
    homes = homes_of(schedule)
    return Header(
        origin=str(origin),
        model=plan.model,
        device=plan.device,
        costs=plan.costs,
        schedule=plan.options.get("schedule", ""),
        digest=digest_of(schedule),
        microbatches=plan.microbatches,
        dp=plan.dp,
        placement=placement_of([homes[stage] for stage in sorted(homes)]),
        step_s=plan.step_s,
        bubble=plan.bubble,
        budget_bytes=plan.budget_bytes,
        memory=memory,
        clocks=clocks,
        order=plan.options.get("placement", ORDERS[0]),
    )


def _transits(plan: Plan, schedule: Schedule, timeline: Timeline) -> Iterator[Transit]:
    """In the order in which ranks post their receives."""
    sizes = {(stage.stage, t.dst, t.phase): t.bytes for stage in plan.stages for t in stage.sends}
    found = {(t.src, t.dst, t.kind, t.microbatch): t for t in timeline.transfers}
    for action in (action for actions in schedule for action in actions):
        if action.kind in RECV.values() and action.peer is not None:
            assert action.microbatch is not None
            ends, phase = (action.peer, action.stage), action.kind.phase
            moved = found[*ends, COMPUTE_OF[phase], action.microbatch]
            nbytes = sizes.get((*ends, phase.value), 0)
            yield Transit(action, moved.start_s, moved.end_s, nbytes)


def _computing(timeline: Timeline) -> Iterator[Span]:
    for rank, row in enumerate(timeline.ranks):
        for x in row:
            yield Span(rank, Lane.COMPUTE, str(x.action), 0, x.start_s, x.end_s)


def _messages(
    schedule: Schedule, timeline: Timeline, transits: tuple[Transit, ...]
) -> Iterator[Span]:
    """Sends while they are under way, and the waiting of who reads them."""
    homes = homes_of(schedule)
    arriving: dict[Action, list[Transit]] = {}
    for transit in transits:
        receive = transit.receive
        send = sender_of(receive)
        yield Span(
            homes[send.stage],
            Lane.COMMUNICATION,
            str(send),
            0,
            transit.start_s,
            transit.end_s,
            transit.nbytes,
        )
        reader = Action(receive.stage, COMPUTE_OF[receive.kind.phase], receive.microbatch)
        arriving.setdefault(reader, []).append(transit)
    for rank, row in enumerate(timeline.ranks):
        free = 0.0
        for x in row:
            for transit in arriving.get(x.action, ()):  # in the order in which they are read
                come = max(free, min(transit.end_s, x.start_s))
                name = str(transit.receive)
                yield Span(rank, Lane.COMMUNICATION, name, 0, free, come, transit.nbytes)
                free = come
            free = x.end_s


def _closing(timeline: Timeline) -> Iterator[Span]:
    """What each rank does once per step, after its last microbatch."""
    for rank, seconds in enumerate(timeline.closing_s):
        row = timeline.ranks[rank]
        if seconds and row:
            end = row[-1].end_s
            yield Span(rank, Lane.CLOSING, "optimizer", 0, end, end + seconds)

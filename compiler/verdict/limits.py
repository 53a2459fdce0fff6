"""Where the seconds of a step go, of the rank that is slowest."""

from __future__ import annotations

from dataclasses import dataclass

from ...passes.schedule.simulate import Timeline, simulate
from ..ir.actions import Kind, from_text
from ..plan.plan import Plan


@dataclass(frozen=True)
class Limit:
    """One of the things that a step's seconds go to.

    Attributes:
        share: of the step.
    """

    name: str
    share: float


def limits_of(plan: Plan, timeline: Timeline) -> tuple[Limit, ...]:
    """All of them, the largest first; their shares add up to 1.

    The slowest rank computes, recomputes what memory does not keep, waits for links (as much as the
    same step is shorter where they take no time), waits in the bubble, and closes the step.

    A plan for inference has only computing, links and the bubble.

    Args:
        timeline: of the plan.
    """
    whole_s = timeline.step_s
    ranks = range(len(timeline.ranks))
    slowest = max(ranks, key=timeline.busy_s)
    stages = plan.ranks[slowest]
    again = sum(each.recompute_s for each in stages)
    all_s = again + sum(each.forward_s + each.backward_s for each in stages)
    busy_s = timeline.busy_s(slowest)
    again_s = busy_s * again / all_s if all_s else 0.0
    closing_s = max(timeline.closing_s, default=0.0)
    linked_s = max(0.0, whole_s - _without_links(plan, timeline).step_s)
    bubble_s = max(0.0, whole_s - busy_s - closing_s - linked_s)
    where = _where(plan, slowest)
    streams = plan.dp > 1 and plan.options.get("zero") in ("2", "3")
    found = {
        f"computing{' and exchange between replicas' if streams else ''} on {where}": (
            busy_s - again_s
        ),
        "the bubble": bubble_s,
        "links between stages": linked_s,
    }
    if plan.training:
        found[f"recomputation for memory on {where}"] = again_s
        found["gradient exchange and optimizer" if plan.dp > 1 else "the optimizer"] = closing_s
    limits = (Limit(name, s / whole_s if whole_s else 0.0) for name, s in found.items())
    return tuple(sorted(limits, key=lambda limit: -limit.share))


def _where(plan: Plan, rank: int) -> str:
    return f"rank {rank}" if plan.virtual_stages > 1 else f"stage {plan.ranks[rank][0].stage}"


def _without_links(plan: Plan, timeline: Timeline) -> Timeline:
    """The same actions, where messages take no time."""
    compute_s: dict[tuple[int, Kind], float] = {
        (each.action.stage, each.action.kind): each.end_s - each.start_s
        for row in timeline.ranks
        for each in row
    }
    return simulate(from_text("\n".join(plan.schedule)), compute_s, {}, timeline.closing_s)

"""The bytes of ranks over time, as lines of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...passes.schedule.simulate import Interval, Timeline
from ..plan.plan import Plan

WIDE, HIGH = 1000, 100
MOST_RANKS = 12
MOST_POINTS = 1500


@dataclass(frozen=True)
class Curve:
    """A rank's bytes in a box of `WIDE` × `HIGH`, from the bottom up.

    Attributes:
        line: an SVG path; ``area`` the same, closed below.
        peak: bytes at once, also inside an action, and the action.
        budget_y, peak_y: where they are; None for no budget.
    """

    rank: int
    line: str
    area: str
    peak: int
    peak_at: str
    peak_y: float
    budget_y: float | None


def peak_of(plan: Plan, rank: int) -> tuple[int, str]:
    """Of a rank of a replica, and the action that needs it."""
    memory = plan.ranks[rank][0].memory
    return memory.peak, memory.peak_at


def curves_of(plan: Plan, timeline: Timeline) -> tuple[Curve, ...]:
    """Of the ranks that hold most; none where bytes were not simulated."""
    rows = timeline.ranks
    if not any(x.held_bytes for row in rows for x in row):
        return ()
    span_s = max(row[-1].end_s for row in rows) or 1.0
    peaks = [peak_of(plan, rank) for rank in range(len(rows))]
    limits = [plan.limit_of(stages[0]) for stages in plan.ranks]
    top = max([peak for peak, _ in peaks] + [limit or 0 for limit in limits]) * 1.06 or 1.0
    fullest = sorted(range(len(rows)), key=lambda rank: -peaks[rank][0])[:MOST_RANKS]
    return tuple(
        _curve(rank, rows[rank], peaks[rank], span_s, top, limits[rank]) for rank in sorted(fullest)
    )


def _curve(
    rank: int,
    row: Sequence[Interval],
    peak: tuple[int, str],
    span_s: float,
    top: float,
    budget: int | None,
) -> Curve:
    def y(nbytes: float) -> float:
        return round(HIGH * (1 - nbytes / top), 2)

    every = max(1, -(-len(row) // MOST_POINTS))
    line = f"M0 {y(row[-1].held_bytes)}"  # a step begins as the one before has ended
    for i in range(0, len(row), every):
        group = row[i : i + every]
        most = max(group, key=lambda x: x.held_bytes)
        line += f"H{round(WIDE * group[0].end_s / span_s, 2):g}V{y(most.held_bytes):g}"
    line += f"H{WIDE}"
    limit = None if budget is None else y(budget)
    return Curve(rank, line, f"{line}V{HIGH}H0Z", *peak, y(peak[0]), limit)

"""The units of a model over its stages, as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..plan.plan import Plan, StagePlan
from ..report.quantities import seconds_text
from ..report.texts import recomputes_text, stage_seconds

MOST_SEGMENTS = 60  # per stage


@dataclass(frozen=True)
class Segment:
    """A unit, or several in a row: its share of the longest stage in percent."""

    width: float
    title: str
    again: bool


@dataclass(frozen=True)
class Bar:
    stage: StagePlan
    seconds: float
    segments: tuple[Segment, ...]

    @property
    def again(self) -> str:
        """What it recomputes; "" for nothing."""
        return recomputes_text(self.stage)

    @property
    def again_share(self) -> float:
        return self.stage.recompute_s / self.seconds if self.seconds else 0.0


def bars_of(plan: Plan, names: Sequence[str]) -> tuple[Bar, ...]:
    """A bar per stage.

    Args:
        names: of the units; empty where they are not known.
    """
    seconds = [stage_seconds(stage) for stage in plan.stages]
    longest = max(seconds) or 1.0
    return tuple(
        Bar(stage, mine, _segments(plan, stage, mine / longest, names))
        for stage, mine in zip(plan.stages, seconds, strict=True)
    )


def _segments(
    plan: Plan, stage: StagePlan, share: float, names: Sequence[str]
) -> tuple[Segment, ...]:
    decision = plan.decision
    units = [i for i, s in enumerate(decision.unit_stage) if s == stage.stage]
    known = [math.fsum(decision.unit_seconds[i]) if decision.unit_seconds else 1.0 for i in units]
    whole = math.fsum(known) or 1.0
    every = max(1, -(-len(units) // MOST_SEGMENTS))
    found = []
    for first in range(0, len(units), every):
        group = units[first : first + every]
        took = math.fsum(known[first : first + every])
        what = [decision.unit_recomputes[i] for i in group]
        again = sorted({label for label in what if label != "nothing"})
        title = ", ".join(_name(i, names) for i in group[:3]) + (" …" if len(group) > 3 else "")
        title += f": {seconds_text(took)}" if decision.unit_seconds else ""
        title += f"; recomputes {', '.join(again)}" if again else ""
        found.append(Segment(round(100 * share * took / whole, 3), title, bool(again)))
    return tuple(found)


def _name(unit: int, names: Sequence[str]) -> str:
    return names[unit] if unit < len(names) else f"unit {unit}"

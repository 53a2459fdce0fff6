"""Ways to divide and to order that were tried, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...passes.schedule.registry import DEFAULT
from ..plan.plan import Plan
from .quantities import bytes_scale, rate_text, seconds_text
from .texts import verdict_text

if TYPE_CHECKING:
    from ..driver.auto import Trial


@dataclass(frozen=True)
class Ways:
    """A table, one row per way.

    Attributes:
        columns: head -> cells.
        left: heads of the columns that are texts.
    """

    title: str
    columns: dict[str, Sequence[object]]
    left: tuple[str, ...] = ("", "schedule")

    @property
    def rows(self) -> list[tuple[object, ...]]:
        return list(zip(*self.columns.values(), strict=True))

    @property
    def texts(self) -> list[int]:
        """Which columns are."""
        return [place for place, head in enumerate(self.columns) if head in self.left]


def ways_of(plan: Plan, trials: Sequence[Trial]) -> Ways:
    """Ways to use the devices; which one the plan has taken, and why.

    Args:
        trials: at least one.
    """
    best_s = min(t.step_s for t in trials if t.step_s is not None)
    taken = plan.n_stages, plan.options.get("schedule", DEFAULT), plan.virtual_stages
    rows = plan.microbatches * plan.microbatch_rows * plan.dp
    ways = [(t.way.n_stages, t.way.schedule, t.way.virtual_stages or 1) for t in trials]
    said = [verdict_text(t, way == taken, best_s) for t, way in zip(trials, ways, strict=True)]
    scale = bytes_scale([t.peak_bytes for t in trials])
    orders = len({t.way.order for t in trials}) > 1
    divides = len({t.way.n_stages for t in trials}) > 1 or not orders
    columns: dict[str, Sequence[object]] = {}
    if divides:
        columns["stages"] = [t.way.n_stages for t in trials]
        columns["dp"] = [t.way.dp for t in trials]
    if orders:
        columns["schedule"] = [t.way.schedule for t in trials]
        columns["stages\nper rank"] = [t.way.virtual_stages or 1 for t in trials]
        columns["micro-\nbatches"] = [t.microbatches or "–" for t in trials]
    columns["step"] = ["–" if t.step_s is None else seconds_text(t.step_s) for t in trials]
    columns["rows/s"] = ["–" if not t.step_s else rate_text(rows / t.step_s) for t in trials]
    if orders:
        columns["bubble"] = [f"{t.bubble:.1%}" if t.step_s else "–" for t in trials]
        columns[f"peak\n{scale.unit}"] = [
            scale.text(t.peak_bytes) if t.step_s else "–" for t in trials
        ]
    devices = trials[0].way.n_stages * trials[0].way.dp
    title = f"divisions of {devices} devices" if divides else "schedules"
    return Ways(title, columns | {"": said})

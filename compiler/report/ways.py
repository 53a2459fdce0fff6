"""Ways to divide and to order that were tried, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...passes.schedule.from_file import kind_of
from ...passes.schedule.registry import DEFAULT
from ..costs.topology import ORDERS
from ..plan.plan import Plan
from .quantities import bytes_scale, rate_text, seconds_text
from .texts import verdict_text

if TYPE_CHECKING:
    from ..driver.auto import Trial


NOTABLE = 0.2  # of what a way takes longer: parts below that are not named


@dataclass(frozen=True)
class Ways:
    """A table, one row per way.

    Attributes:
        columns: head -> cells.
        left: heads of the columns that are texts.
        why: what the next best loses to the best; "" where there is none.
        refused: ways that are not possible, with the reasons.
    """

    title: str
    columns: dict[str, Sequence[object]]
    left: tuple[str, ...] = ("schedule", "machines\nshared by", "backend")
    why: str = ""
    refused: tuple[str, ...] = ()

    @property
    def rows(self) -> list[tuple[object, ...]]:
        return list(zip(*self.columns.values(), strict=True))

    @property
    def texts(self) -> list[int]:
        """Which columns are."""
        return [place for place, head in enumerate(self.columns) if head in self.left]


def ways_of(plan: Plan, trials: Sequence[Trial]) -> Ways:
    """Ways to use the devices; which one the plan has taken.

    Args:
        trials: at least one that is possible.
    """
    shown = [t for t in trials if t.step_s is not None]
    steps_s = [t.step_s or 0.0 for t in shown]
    best_s = min(t.step_s or 0.0 for t in shown if not t.reason)
    taken = _taken(plan, shown)
    rows = plan.microbatches * plan.microbatch_rows * plan.dp
    amount = plan.microbatches * plan.microbatch_tokens * plan.dp or rows
    about = ["≈ " if t.about else "" for t in shown]
    scale = bytes_scale([t.peak_bytes for t in shown])
    several = {name: len({getattr(t.way, name) for t in shown}) > 1 for name in ("order", "dp")}
    columns: dict[str, Sequence[object]] = {}
    divides = several["dp"] or not several["order"]
    if divides:
        columns["ranks\n× dp"] = [f"{t.way.n_stages} × {t.way.dp}" for t in shown]
    if several["order"]:
        columns["schedule"] = [_order(t) for t in shown]
    if len({t.way.placement for t in shown}) > 1:
        columns["machines\nshared by"] = [t.way.placement or "–" for t in shown]
    if len({t.way.backend for t in shown}) > 1:
        columns["backend"] = [t.way.backend or "–" for t in shown]
    if len({t.zero for t in shown}) > 1:
        columns["zero"] = [t.zero for t in shown]
    columns["micro-\nbatches"] = [t.microbatches or "–" for t in shown]
    columns["step" if plan.training else "forward"] = [
        f"{a}{seconds_text(s)}" for a, s in zip(about, steps_s, strict=True)
    ]
    unit = "tokens/s" if plan.microbatch_tokens else "rows/s"
    columns[unit] = [rate_text(amount / s) if s else "–" for s in steps_s]
    columns["bubble"] = [f"{t.bubble:.1%}" for t in shown]
    if any(t.mfu for t in shown):
        columns["MFU"] = [f"{t.mfu:.1%}" for t in shown]
    columns[f"peak\n{scale.unit}"] = [scale.text(t.peak_bytes) for t in shown]
    if any(t.device_hours for t in shown):
        columns["hours\nfor 10⁹"] = [rate_text(t.device_hours) for t in shown]
    columns["to the\nbest"] = [
        "no plan" if t.reason else verdict_text(s, t is taken, best_s)
        for t, s in zip(shown, steps_s, strict=True)
    ]
    devices = trials[0].way.n_stages * trials[0].way.dp
    title = f"ways to use {devices} devices" if divides else "schedules"
    if not several["dp"] and not several["order"] and len({t.way.placement for t in shown}) > 1:
        title = "which ranks share a machine"
    refused = (
        *(f"no plan: {_named(t, several['order'])}: {_first(t.reason)}" for t in shown if t.reason),
        *(f"not possible: {t.told(orders=several['order'])}" for t in trials if t.step_s is None),
    )
    return Ways(title, columns, why=_why(shown, several["order"]), refused=refused)


def _why(shown: Sequence[Trial], orders: bool) -> str:
    """What the best of the others takes longer for than the best plan; of a sketch only what it
    waits is known, and it may promise less than any plan takes."""
    able = sorted((t for t in shown if not t.reason), key=lambda t: (t.about, t.step_s or 0.0))
    if len(able) < 2:
        return ""
    best, *others = able
    other = min(others, key=lambda t: t.step_s or 0.0)
    named = f"the next best ({_named(other, orders)})"
    more_s = (other.step_s or 0.0) - (best.step_s or 0.0)
    if more_s <= 0:
        return f"{named} takes {'no longer by its sketch' if other.about else 'as long'}"
    known = bool(best.parts and other.parts)
    own, theirs = (t.parts if known else _waits(t) for t in (best, other))
    more = sorted(((theirs[name] - own_s, name) for name, own_s in own.items()), reverse=True)
    told = ", ".join(
        f"{name} {seconds_text(abs(s))} {'more' if s > 0 else 'less'}"
        for s, name in more
        if abs(s) >= NOTABLE * more_s
    )
    return f"{named} takes {seconds_text(more_s)} longer{f': {told}' if told else ''}"


def _waits(trial: Trial) -> dict[str, float]:
    return {"waiting": trial.bubble * (trial.step_s or 0.0)}


def _named(trial: Trial, orders: bool) -> str:
    order = f", {_order(trial)}" if orders else ""
    return f"{trial.way}{order}, zero {trial.zero}, {trial.microbatches} microbatches"


def _first(reason: str) -> str:
    """What does not fit, without what would help."""
    return reason.partition(": ")[0]


def _order(trial: Trial) -> str:
    virtual = trial.way.virtual_stages or 1
    return f"{trial.way.schedule} ×{virtual}" if virtual > 1 else trial.way.schedule


Shape = tuple[int, int, str, int, int | None, int, str]


def _taken(plan: Plan, shown: Sequence[Trial]) -> Trial | None:
    """The one that the plan is of: of those with other backends the best that was planned."""
    own = _shape_of(plan)
    alike = [t for t in shown if _shape(t, plan) == own and not t.reason]
    return min(alike, key=lambda t: (t.about, t.step_s or 0.0), default=None)


def _shape_of(plan: Plan) -> Shape:
    schedule, zero = plan.options.get("schedule", DEFAULT), int(plan.options.get("zero", 0))
    order = plan.options.get("placement", ORDERS[0])
    return plan.n_stages, plan.dp, schedule, plan.virtual_stages, plan.microbatches, zero, order


def _shape(trial: Trial, plan: Plan) -> Shape:
    way = trial.way
    virtual = way.virtual_stages or kind_of(way.schedule).usual_virtual
    count = plan.microbatches if trial.microbatches is None else trial.microbatches
    order = way.placement or plan.options.get("placement", ORDERS[0])
    return way.n_stages, way.dp, way.schedule, virtual, count, trial.zero, order

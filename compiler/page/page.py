"""Plan, simulated step and what is said of them -> one HTML file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...passes.schedule.simulate import Timeline
from ..plan.plan import Plan
from ..plan.writing import write_whole
from ..report.quantities import (
    bytes_text,
    count_scale,
    counted,
    flops_text,
    rate_text,
    seconds_text,
)
from ..report.report import Extras
from ..report.ways import ways_of
from . import memory
from .gantt import Gantt, gantt_of
from .memory import Curve, curves_of, peak_of
from .stages import bars_of

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
        units: names of the plan's units; empty where they are not known.
    """

    plan: Plan
    timeline: Timeline
    extras: Extras = field(default_factory=Extras)
    units: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A number at the top of the page."""

    name: str
    value: str
    more: str = ""


def write_page(page: Page, path: Path) -> None:
    """Write the file; one that is there is replaced whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, [html_of(page)])


def html_of(page: Page) -> str:
    """The page: styles, script and drawings are in it; it asks nothing of any network."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,  # models and modules are named by users
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (bytes_text, seconds_text, flops_text, counted):
        environment.filters[function.__name__] = function
    environment.filters["count_text"] = _count_text
    return environment.get_template("page.html").render(_context(page))


def _context(page: Page) -> dict[str, Any]:
    plan, timeline = page.plan, page.timeline
    gantt = gantt_of(timeline)
    peaks = [peak_of(plan, lane.rank) for lane in gantt.lanes]
    curves = curves_of(plan, timeline)
    return {
        "plan": plan,
        "extras": page.extras,
        "ways": ways_of(plan, page.extras.trials) if page.extras.trials else None,
        "timeline": timeline,
        "gantt": gantt,
        "peaks": peaks,
        "curves": curves,
        "some": len(curves) == memory.MOST_RANKS < len(gantt.lanes),
        "bars": bars_of(plan, page.units),
        "figures": _figures(page, max(peak for peak, _ in peaks)),
        "passes": [(record.name, record.note) for record in page.extras.passes] or plan.notes,
        "data": Markup(_embedded(_data(gantt, curves))),
        "style": Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        "script": Markup((FOLDER / "page.js").read_text(encoding="utf-8")),
        "kinds": {"F": "forward", "B": "backward", "W": "weight gradients"},
    }


def _figures(page: Page, peak: int) -> list[Figure]:
    plan, timeline = page.plan, page.timeline
    made = plan.microbatches * plan.dp
    rows = f"{rate_text(made * plan.microbatch_rows / plan.step_s)} rows/s" if plan.step_s else ""
    tokens = made * plan.microbatch_tokens
    rate = f"{rate_text(tokens / plan.step_s)} tokens/s" if tokens and plan.step_s else rows
    budget = plan.limit_of(plan.fullest)
    closing = max(timeline.closing_s, default=0.0)
    ranks = len(timeline.ranks)
    return [
        Figure("step", seconds_text(plan.step_s), rate),
        Figure("bubble", f"{plan.bubble:.1%}", "of the ranks' time computes nothing"),
        Figure(
            "fullest rank",
            bytes_text(peak),
            f"{peak / budget:.0%} of {bytes_text(budget)}" if budget else "no limit was given",
        ),
        Figure(
            "once per step",
            seconds_text(closing),
            "optimizer and gradient exchange" if plan.dp > 1 else "optimizer",
        ),
        Figure(
            "ranks",
            f"{ranks * plan.dp}",
            f"{counted(ranks, 'rank')} × dp {plan.dp}; {counted(len(plan.stages), 'stage')}",
        ),
        Figure(
            "microbatches",
            str(plan.microbatches),
            f"of {counted(plan.microbatch_rows, 'row')} per replica",
        ),
    ]


def _data(gantt: Gantt, curves: tuple[Curve, ...]) -> dict[str, Any]:
    """What the script reads: times in nanoseconds."""
    lanes = [
        [[kind, stage, i, round(a * 1e9), round(b * 1e9), held] for kind, stage, i, a, b, held in
         lane.actions]
        for lane in gantt.lanes
    ]  # fmt: skip
    tops = [[lane.top, lane.height] for lane in gantt.lanes]
    return {"span": round(gantt.span_s * 1e9), "lanes": lanes, "tops": tops}


def _embedded(data: dict[str, Any]) -> str:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _count_text(number: int) -> str:
    scale = count_scale([number])
    return f"{scale.text(number)} {scale.unit}".strip()

"""Pictures made of characters: the schedule in time, bars."""

from __future__ import annotations

import string
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from rich.text import Text

from .quantities import seconds_text

if TYPE_CHECKING:
    from ...passes.schedule.simulate import Interval, Timeline

BAR_WIDTH = 12

_IDLE = "·"
_STYLES = {"F": "cyan", "B": "green", "W": "blue", "": "dim"}
_LATER = ("", " underline", " bold", " bold underline")
"""How the second, third, ... stage of a rank differs from the first."""
_LEVELS = ((0.8, "green"), (0.95, "yellow"), (1.0, "red"))


def bar(part: float, whole: float, room: int = BAR_WIDTH) -> Text:
    """``[██████░░]``; coloured as it fills, shorter where there is no room."""
    width = max(4, min(BAR_WIDTH, room))
    share = min(part / whole, 1.0) if whole else 0.0
    full = round(share * width)
    style = next((style for limit, style in _LEVELS if share <= limit), "red")
    return Text.assemble("[", ("█" * full, style), ("░" * (width - full), "dim"), "]")


def schedule_chart(timeline: Timeline, microbatches: int, width: int) -> Text:
    """One line per rank, with all its stages; each column shows what runs in the middle of its
    span of time."""
    held = [sorted({x.action.stage for x in row}) for row in timeline.ranks]
    labels = [",".join(map(str, stages)) for stages in held]
    several = any(len(stages) > 1 for stages in held)
    noun = "stages" if several else "stage"
    digits = max(map(len, labels))
    columns = max(width - digits - len(f"{noun}   100 % busy "), 20)
    span_s = timeline.makespan_s / columns
    text = Text.assemble(("schedule", "bold"), "\n")
    for rank, row in enumerate(timeline.ranks):
        text.append(f"{noun} {labels[rank]:>{digits}} ")
        for (kind, stage), marks in groupby(_marks(row, columns, span_s), key=itemgetter(0, 1)):
            later = held[rank].index(stage) if kind else 0
            style = _STYLES[kind] + _LATER[later % len(_LATER)]
            text.append("".join(mark for *_, mark in marks), style=style)
        text.append(f" {timeline.busy_s(rank) / timeline.makespan_s:4.0%} busy\n")
    kinds = {str(interval.action.kind) for row in timeline.ranks for interval in row}
    legend = _legend(microbatches, span_s, "W" in kinds)
    text.append(textwrap.fill(legend, width, break_on_hyphens=False))
    return text


def _marks(row: Sequence[Interval], columns: int, span_s: float) -> Iterator[tuple[str, int, str]]:
    """Per column, the kind and stage of the action that runs, and the letter of its microbatch."""
    intervals = iter(row)
    current = next(intervals, None)
    for column in range(columns):
        now_s = (column + 0.5) * span_s
        while current is not None and current.end_s <= now_s:
            current = next(intervals, None)
        if current is None or current.start_s > now_s:
            yield "", 0, _IDLE
        else:
            action, kind = current.action, str(current.action.kind)
            letters = {"F": string.ascii_lowercase, "B": string.ascii_uppercase}.get(kind, "+")
            yield kind, action.stage, letters[(action.microbatch or 0) % len(letters)]


def _legend(microbatches: int, span_s: float, splits: bool) -> str:
    last = min(microbatches, 26) - 1
    lower, upper = string.ascii_lowercase, string.ascii_uppercase
    which = f"microbatches 0–{last}" if last else "microbatch 0"
    spans = (f"{a[0]}–{a[last]}" if last else a[0] for a in (lower, upper))
    again = ", and again from a" if microbatches > 26 else ""
    forward, backward = spans
    return (
        f"{forward} forward of {which}{again}; {backward} backward; "
        + ("+ weight gradients; " if splits else "")
        + f"{_IDLE} idle; a column is {seconds_text(span_s)}"
    )

"""The schedule in time as rectangles of a drawing that can be stretched.

Positions are in percent of the width, so that a page may draw it at any. Above `MOST_RECTS`
actions a lane is cut into columns that show what runs in them most: the drawing stays small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...passes.schedule.simulate import Interval, Timeline
from ..report.quantities import seconds_text

MOST_RECTS = 6000
COLUMNS = (60, 600)  # per lane, at least and at most, of a drawing in columns
SHADES = 4
_TALL, _LOW = 30.0, 14.0  # pixels of a lane; of many lanes
_GAP = 4.0
_MANY = 24  # lanes
_LETTER, _WIDTH = 6.6, 1000.0  # pixels: of a letter, and of a drawing on a usual screen


@dataclass(frozen=True)
class Rect:
    """A rectangle: ``left`` and ``width`` in percent, the others in pixels."""

    left: float
    width: float
    top: float
    height: float
    style: str
    label: str = ""

    @property
    def middle(self) -> float:
        return self.left + self.width / 2


@dataclass(frozen=True)
class Lane:
    """A rank.

    Attributes:
        actions: per action kind, stage, microbatch, start and end in seconds, and bytes then;
            empty of a drawing in columns.
    """

    rank: int
    stages: tuple[int, ...]
    top: float
    height: float
    busy_s: float
    rects: tuple[Rect, ...]
    actions: list[tuple[str, int, int, float, float, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Tick:
    left: float
    label: str


@dataclass(frozen=True)
class Gantt:
    """Attributes: ``coarse``: whether it is drawn in columns."""

    lanes: tuple[Lane, ...]
    ticks: tuple[Tick, ...]
    span_s: float
    height: float
    coarse: bool
    kinds: tuple[str, ...]

    @property
    def count(self) -> int:
        return sum(len(lane.rects) for lane in self.lanes)


def gantt_of(timeline: Timeline) -> Gantt:
    """The drawing of a timeline."""
    rows = timeline.ranks
    span_s = max((row[-1].end_s for row in rows if row), default=0.0) or 1.0
    coarse = sum(map(len, rows)) > MOST_RECTS
    tall = _LOW if len(rows) > _MANY else _TALL
    columns = min(max(2 * MOST_RECTS // max(len(rows), 1), COLUMNS[0]), COLUMNS[1])
    lanes = []
    for rank, row in enumerate(rows):
        stages = tuple(sorted({x.action.stage for x in row}))
        top = rank * (tall + _GAP)
        places = {stage: place_of(i, len(stages), tall) for i, stage in enumerate(stages)}
        if coarse:
            rects = tuple(_columns(row, span_s, columns, top, tall))
        else:
            rects = tuple(_rect(x, span_s, top, places[x.action.stage]) for x in row)
        actions = [] if coarse else [_data(x) for x in row]
        lanes.append(Lane(rank, stages, top, tall, timeline.busy_s(rank), rects, actions))
    kinds = sorted({str(x.action.kind) for row in rows for x in row}, key="FBW".index)
    height = len(rows) * (tall + _GAP)
    return Gantt(tuple(lanes), tuple(ticks_of(span_s)), span_s, height, coarse, tuple(kinds))


def place_of(number: int, stages: int, tall: float) -> tuple[float, float]:
    """Top and height of a stage's rectangles in its rank's lane: later stages lie lower, so that
    the eye tells them apart; each has half of the lane or more."""
    if stages == 1:
        return 0.0, tall
    height = tall * max(0.5, 1 - 0.2 * (stages - 1))
    return (tall - height) * number / (stages - 1), height


def ticks_of(span_s: float, most: int = 8) -> Iterator[Tick]:
    """Round times."""
    rough = span_s / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough * (1 - 1e-9))
    for i in range(int(span_s / step * (1 + 1e-9)) + 1):
        yield Tick(percent(i * step, span_s), seconds_text(i * step) if i else "0")


def percent(part: float, whole: float) -> float:
    """Three digits are a hundredth of a pixel."""
    return round(100 * part / whole, 3)


def _rect(x: Interval, span_s: float, top: float, place: tuple[float, float]) -> Rect:
    left, width = percent(x.start_s, span_s), percent(x.end_s - x.start_s, span_s)
    name = str(x.action)
    fits = width / 100 * _WIDTH >= len(name) * _LETTER + 4 and place[1] >= _LOW
    style = f"{x.action.kind} s{(x.action.microbatch or 0) % SHADES}"
    return Rect(left, width, top + place[0], place[1], style, name if fits else "")


def _data(x: Interval) -> tuple[str, int, int, float, float, int]:
    a = x.action
    return str(a.kind), a.stage, a.microbatch or 0, x.start_s, x.end_s, x.held_bytes


def _columns(
    row: Sequence[Interval], span_s: float, columns: int, top: float, tall: float
) -> Iterator[Rect]:
    """Per column what runs in it longest, paler where it is idle for a part; equal ones in one."""
    width_s = span_s / columns
    seconds: list[dict[str, float]] = [{} for _ in range(columns)]
    for x in row:
        first = min(int(x.start_s / width_s), columns - 1)
        last = min(int(x.end_s / width_s), columns - 1)
        for column in range(first, last + 1):
            start, end = max(x.start_s, column * width_s), min(x.end_s, (column + 1) * width_s)
            kind = str(x.action.kind)
            seconds[column][kind] = seconds[column].get(kind, 0.0) + max(end - start, 0.0)
    styles = [_style(each, width_s) for each in seconds] + [""]
    begin = 0
    for column in range(1, columns + 1):
        if styles[column] != styles[begin]:
            if styles[begin]:
                left, right = percent(begin, columns), percent(column, columns)
                yield Rect(left, round(right - left, 3), top, tall, styles[begin])
            begin = column


def _style(seconds: dict[str, float], width_s: float) -> str:
    busy = sum(seconds.values()) / width_s
    if busy < 0.05:
        return ""
    shade = SHADES - 1 - min(int(busy * SHADES), SHADES - 1)
    return f"{max(seconds, key=seconds.__getitem__)} s{shade}"

"""A plan as text for people: with rich in a terminal, in plain columns when piped."""

from __future__ import annotations

import io
import string
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .plan import Plan, StagePlan, TiedPlan, Transfer

if TYPE_CHECKING:
    from .simulate import Interval, Timeline

PLAIN_WIDTH = 120  # of the chart; tables are as wide as what they hold
SHOWN_VALUES = 4

_IDLE = "·"
_STYLES = {"F": "cyan", "B": "green", "W": "blue", "": "dim"}


def write_report(plan: Plan, timeline: Timeline, stream: TextIO) -> None:
    """Write everything that a plan says; the chart is as wide as the terminal."""
    if stream.isatty():
        console = Console(file=stream)
        for section in _sections(plan, timeline, console.width, plain=False):
            console.print(section, "", sep="\n")
        return
    console = Console(file=io.StringIO(), width=10_000, color_system=None, force_terminal=False)
    sections = list(_sections(plan, timeline, PLAIN_WIDTH, plain=True))
    with console.capture() as captured:
        for section in sections:
            console.print(section, "", sep="\n")
    lines = [line.rstrip() for line in captured.get().rstrip().splitlines()]
    stream.write("\n".join(lines) + "\n")


def _sections(
    plan: Plan, timeline: Timeline, width: int, *, plain: bool
) -> Iterator[RenderableType]:
    yield _header(plan)
    yield _stage_table(plan, plain)
    if plan.tied:
        yield _lines("tied weights", [_tied_line(tied) for tied in plan.tied])
    if any(stage.sends for stage in plan.stages):
        yield _transfer_table(plan, plain)
    yield _chart(timeline, plan.microbatches, width)
    yield _lines("totals", _totals(plan))
    yield _lines("passes", [f"{name}: {note}" for name, note in plan.notes])


def _header(plan: Plan) -> Text:
    ranks, rows = plan.n_stages * plan.dp, plan.microbatches * plan.microbatch_rows * plan.dp
    details = [
        f"microbatch: {plan.shape}",
        f"{_count(plan.n_stages, 'stage')} × dp {plan.dp} = {_count(ranks, 'rank')}; "
        f"{_count(plan.microbatches, 'microbatch')} of {_count(plan.microbatch_rows, 'row')} per "
        f"replica, {_count(rows, 'row')} per step",
    ]
    return _lines(f"{plan.model}: {plan.param_count:,} parameters", details)


def _stage_table(plan: Plan, plain: bool) -> Table:
    """One row per stage; forward, backward, stash and sends are of one microbatch."""
    stages = plan.stages
    columns = {
        "params": _column([s.param_count for s in stages], 1000, "", _DECIMAL[:3]),
        "weights": _column([s.param_bytes for s in stages], 1024, "B", _BINARY),
        "forward": _column([s.forward_flops for s in stages], 1000, "FLOP", _DECIMAL),
        "backward": _column([s.backward_flops for s in stages], 1000, "FLOP", _DECIMAL),
        "stash": _column([s.stash_bytes for s in stages], 1024, "B", _BINARY),
        "in": ("flight", [str(s.in_flight) for s in stages]),
        "sends": _column([_sent(s) for s in stages], 1024, "B", _BINARY),
    }
    headers = [f"{name}\n{unit}" for name, (unit, _) in columns.items()]
    table = _table(plain, "stage", *headers, "modules", left=("modules",))
    for i, stage in enumerate(stages):
        cells = [values[i] for _, values in columns.values()]
        table.add_row(str(stage.stage), *cells, Text(", ".join(stage.modules)))
    return table


def _tied_line(tied: TiedPlan) -> str:
    aliases = "".join(f" = {name}" for name in tied.names if name != tied.name)
    where = ", ".join(map(str, tied.stages))
    amount = f"{len(tied.stages) - 1} × {_bytes(tied.bytes)}"
    head = f"{tied.name}{aliases}: on stages {where}, owned by {tied.owner}; the parts of its "
    if tied.summed == "per_step":
        return f"{head}gradient are sent once per step ({amount}), and the sum back"
    return (
        f"{head}gradient are sent with every microbatch ({amount}), and the sum back once per "
        'step; tied_grads="per_step" sends less, but is no longer bit-exact'
    )


def _transfer_table(plan: Plan, plain: bool) -> Table:
    table = _table(plain, "from", "to", "phase", "bytes", "values", left=("phase", "values"))
    for stage in plan.stages:
        for message in stage.sends:
            table.add_row(
                str(stage.stage),
                str(message.dst),
                message.phase,
                _bytes(message.bytes),
                Text(_values(message)),
            )
    return table


def _sent(stage: StagePlan) -> int:
    return sum(message.bytes for message in stage.sends)


def _values(message: Transfer) -> str:
    shown = ", ".join(message.values[:SHOWN_VALUES])
    more = len(message.values) - SHOWN_VALUES
    return f"{shown} and {more} more" if more > 0 else shown


# -- the chart ----------------------------------------------------------------------------------


def _chart(timeline: Timeline, microbatches: int, width: int) -> Text:
    """One line per stage; each column shows what runs in the middle of its span of time."""
    digits = len(str(len(timeline.stages) - 1))
    columns = max(width - digits - len("stage   100 % busy "), 20)
    span_s = timeline.makespan_s / columns
    text = Text.assemble(("schedule", "bold"), "\n")
    for stage, row in enumerate(timeline.stages):
        text.append(f"stage {stage:>{digits}} ")
        for kind, marks in groupby(_marks(row, columns, span_s), key=itemgetter(0)):
            text.append("".join(mark for _, mark in marks), style=_STYLES[kind])
        text.append(f" {timeline.busy_s(stage) / timeline.makespan_s:4.0%} busy\n")
    kinds = {str(interval.action.kind) for row in timeline.stages for interval in row}
    text.append(_legend(microbatches, span_s, "W" in kinds))
    return text


def _marks(row: Sequence[Interval], columns: int, span_s: float) -> Iterator[tuple[str, str]]:
    """Per column, the kind of the action that runs, and the letter of its microbatch."""
    intervals = iter(row)
    current = next(intervals, None)
    for column in range(columns):
        now_s = (column + 0.5) * span_s
        while current is not None and current.end_s <= now_s:
            current = next(intervals, None)
        if current is None or current.start_s > now_s:
            yield "", _IDLE
        else:
            kind = str(current.action.kind)
            letters = {"F": string.ascii_lowercase, "B": string.ascii_uppercase}.get(kind, "+")
            yield kind, letters[(current.action.microbatch or 0) % len(letters)]


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
        + f"{_IDLE} idle; a column is {_seconds(span_s)}"
    )


# -- totals -------------------------------------------------------------------------------------


def _totals(plan: Plan) -> list[str]:
    stages, m = plan.stages, plan.microbatches
    ideal = (plan.n_stages - 1) / (m + plan.n_stages - 1)
    forward, backward = (
        m * plan.dp * sum(getattr(stage, f"{phase}_flops") for stage in stages)
        for phase in ("forward", "backward")
    )
    sent = m * sum(_sent(stage) for stage in stages)
    keeps = max(stages, key=lambda stage: stage.in_flight * stage.stash_bytes)
    holds = max(stages, key=lambda stage: stage.param_bytes)
    return [
        f"step: {_seconds(plan.step_s)} at the peak rates of {plan.device}, without the optimizer",
        f"bubble: {plan.bubble:.1%}; with equal stages and free transfers "
        f"(S−1)/(m+S−1) = {ideal:.1%}",
        f"compute: {_flops(forward)} forward, {_flops(backward)} backward per step of all replicas",
        f"transfers: {_bytes(sent)} per step of one replica",
        f"weights: at most {_bytes(holds.param_bytes)}, on stage {holds.stage}",
        f"stash: at most {keeps.in_flight} × {_bytes(keeps.stash_bytes)} = "
        f"{_bytes(keeps.in_flight * keeps.stash_bytes)}, on stage {keeps.stage}",
    ]


# -- texts --------------------------------------------------------------------------------------

_DECIMAL = ("", "K", "M", "G", "T", "P")
_BINARY = ("", "Ki", "Mi", "Gi", "Ti")


def _lines(title: str, lines: Sequence[str]) -> Text:
    return Text.assemble((title, "bold"), *(f"\n  {line}" for line in lines))


def _table(plain: bool, *columns: str, left: Sequence[str]) -> Table:
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("h") else "s")
    return f"{number} {noun if number == 1 else plural}"


def _scale(number: float, base: int, prefixes: Sequence[str]) -> tuple[float, str]:
    """The largest power of ``base`` that is not above a number, and its prefix."""
    power = 0
    while power + 1 < len(prefixes) and abs(number) >= base ** (power + 1):
        power += 1
    return float(base**power), prefixes[power]


def _column(
    numbers: Sequence[int], base: int, unit: str, prefixes: Sequence[str]
) -> tuple[str, list[str]]:
    """Numbers in one unit, that of the largest: the unit, and their texts."""
    scale, prefix = _scale(max(numbers), base, prefixes)
    return prefix + unit, [f"{number / scale:,.{1 if prefix else 0}f}" for number in numbers]


def _flops(number: int) -> str:
    unit, (text,) = _column([number], 1000, "FLOP", _DECIMAL)
    return f"{text} {unit}"


def _bytes(number: int) -> str:
    unit, (text,) = _column([number], 1024, "B", _BINARY)
    return f"{text} {unit}"


def _seconds(number: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if number >= scale:
            return f"{number / scale:,.2f} {unit}"
    return f"{number * 1e6:.2f} µs"

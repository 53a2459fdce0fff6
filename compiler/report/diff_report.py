"""A plan beside its run, as text or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TextIO

from ..trace.difference import Difference, Pair, Waiting
from .quantities import counted, seconds_text

_HEADS = ("planned", "measured", "ratio")


def write_difference(found: Difference, stream: TextIO, *, as_json: bool) -> None:
    """Tables in plain columns, or a JSON object with the same numbers."""
    if as_json:
        stream.write(json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n")
        return
    stream.write("\n".join(_lines(found)) + "\n")


def _lines(found: Difference) -> Iterator[str]:
    yield f"{found.model}: {found.schedule}, {counted(found.steps, 'step')} measured (medians)"
    yield ""
    rows = [("", *_HEADS), ("step", *_seconds(found.step_s))]
    rows.append(("after the last computation", *_seconds(found.closing_s)))
    if found.bubble is not None and found.simulated_bubble is not None:
        rows.append(("bubble", *_shares(found.bubble)))
        again = Pair(found.simulated_bubble, found.bubble.measured)
        rows.append(("bubble, at the measured seconds", *_shares(again)))
    yield from _columns(rows, left=1)
    yield ""
    yield "seconds of a microbatch"
    computed = [(str(c.stage), c.kind, *_seconds(c.seconds)) for c in found.computations]
    yield from _columns([("stage", "kind", *_HEADS), *computed])
    if found.waiting:
        yield ""
        yield "waiting for messages, per step"
        heads = ("rank", "stages", *_HEADS, "most for", "others for it", "sends take")
        yield from _columns([heads, *map(_waiting, found.waiting)])
    for note in found.notes:
        yield ""
        yield note


def _waiting(row: Waiting) -> tuple[str, ...]:
    most = "–" if row.most_for is None else f"rank {row.most_for}, {seconds_text(row.most_s)}"
    stages = " ".join(map(str, row.stages))
    others, sends = seconds_text(row.caused_s), seconds_text(row.sending_s)
    return (str(row.rank), stages, *_seconds(row.seconds), most, others, sends)


def _seconds(pair: Pair) -> tuple[str, str, str]:
    return seconds_text(pair.planned), seconds_text(pair.measured), _ratio(pair)


def _shares(pair: Pair) -> tuple[str, str, str]:
    return f"{pair.planned:.1%}", f"{pair.measured:.1%}", _ratio(pair)


def _ratio(pair: Pair) -> str:
    return "–" if pair.ratio is None else f"{pair.ratio:.3f} ×"


def _columns(rows: Sequence[Sequence[str]], left: int = 0) -> Iterator[str]:
    """Right-aligned but for the first ``left`` columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()

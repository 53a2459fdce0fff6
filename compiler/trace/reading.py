"""Reads a trace that was written here, and says what is wrong with a file that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..ir.errors import TraceError
from ..plan.plan import made
from . import trace as form
from .trace import Header, Held, Lane, Origin, Span, Trace
from .writing import HELD, SCHEMA


def read_trace(path: Path) -> Trace:
    """Read what `write_trace` wrote.

    Raises:
        TraceError: no such file, not a trace of ours, one of another version, or a damaged one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"cannot read the trace {str(path)!r}: {error}") from error
    try:
        given = json.loads(text)
    except ValueError as error:
        raise TraceError(f"{path} is no trace: it is not JSON ({error})") from error
    if not isinstance(given, dict) or not isinstance(given.get("traceEvents"), list):
        hint = " but a plan: write its trace with inspect --plan FILE --trace OUT"
        plan = isinstance(given, dict) and "decision" in given
        raise TraceError(f"{path} is no trace{hint if plan else ': it has no traceEvents'}")
    data = given.get("otherData")
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise TraceError(
            f"{path} is a trace of another program: diff reads those of inspect --trace and "
            "pipe.trace()"
        )
    if data.get("version") != form.TRACE_VERSION:
        raise TraceError(
            f"{path} is a trace of version {data.get('version')}, this pipecompile reads "
            f"{form.TRACE_VERSION}: write it anew"
        )
    try:
        header: Header = made(Header, {k: v for k, v in data.items() if k != "schema"}, "otherData")
        Origin(header.origin)
        return _trace(header, given["traceEvents"])
    except (TypeError, ValueError, KeyError) as error:
        raise TraceError(f"{path} is damaged ({error}): write it anew") from error


def _trace(header: Header, events: list[Any]) -> Trace:
    spans, held, ranks = [], [], set()
    for event in events:
        if not isinstance(event, dict):
            raise TypeError(f"an event is {event!r}")
        letter, rank = event["ph"], _number(event["pid"]) - 1
        if letter == "X":
            start_s = _number(event["ts"]) / 1e6
            args = event["args"]
            spans.append(
                Span(
                    int(rank),
                    Lane(event["cat"]),
                    str(event["name"]),
                    int(_number(args["step"])),
                    start_s,
                    start_s + _number(event["dur"]) / 1e6,
                    int(_number(args.get("bytes", 0))),
                )
            )
        elif letter == "C" and event["name"] == HELD:
            nbytes = int(_number(event["args"]["bytes"]))
            held.append(Held(int(rank), _number(event["ts"]) / 1e6, nbytes))
        elif letter == "M" and event["name"] == "process_name":
            ranks.add(int(rank))
    return Trace(header, tuple(sorted(ranks)), tuple(spans), tuple(held))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return value

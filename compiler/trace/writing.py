"""A trace as the JSON that Perfetto and chrome://tracing open.

The format is Chrome's "Trace Event Format": a process per rank, a thread per lane, complete events
(``X``) with microseconds, flow arrows (``s`` to ``f``) from sends to receives, counters (``C``) of
bytes. Events of one thread have to nest, so spans that overlap get further threads of their lane.
Process 0 and thread 0 are those of an idle kernel to Perfetto: numbers begin with 1.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..ir.errors import TraceError
from ..plan.writing import write_whole
from .trace import Lane, Span, Trace, messages_of

SCHEMA = "pipecompile-trace"
HELD = "bytes held"
THREADS = 1000  # of a lane, at most
_SHORTEST_US = 0.001  # an arrow needs a slice that lasts

Event = dict[str, Any]


def write_trace(trace: Trace, path: Path) -> None:
    """Write a file; one that is there is replaced whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, lines_of(trace))


def check_writable(path: Path, asked: str) -> None:
    """Raises TraceError where no file can be written.

    Args:
        asked: what asks for it, for the message.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise TraceError(f"{asked} is a folder: name a file in it")
    if not folder.is_dir():
        raise TraceError(f"{asked}: there is no folder {str(folder)!r}: make it first")
    if not os.access(folder, os.W_OK):
        raise TraceError(f"{asked}: nothing can be written in {str(folder)!r}")


def lines_of(trace: Trace) -> Iterator[str]:
    """The file, an event a line."""
    data = json.dumps({"schema": SCHEMA} | asdict(trace.header), ensure_ascii=False)
    yield f'{{"displayTimeUnit":"ms","otherData":{data},"traceEvents":[\n'
    before = ""
    for event in events_of(trace):
        yield before + json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        before = ",\n"
    yield "\n]}\n"


def events_of(trace: Trace) -> Iterator[Event]:
    """Names of ranks and lanes first, then spans in order of time, arrows and bytes."""
    threads = _threads(trace.spans)
    for rank in trace.ranks:
        yield _named("process_name", rank, name=trace.header.label(rank))
        yield _named("process_sort_index", rank, sort_index=rank)
    for rank, thread in sorted(set(zip((s.rank for s in threads), threads.values(), strict=True))):
        lane = list(Lane)[(thread - 1) // THREADS]
        yield _named("thread_name", rank, thread, name=str(lane))
        yield _named("thread_sort_index", rank, thread, sort_index=thread)
    for span in sorted(trace.spans, key=lambda span: (span.start_s, -span.end_s)):
        yield {
            "ph": "X",
            "name": span.name,
            "cat": str(span.lane),
            "pid": span.rank + 1,
            "tid": threads[span],
            "ts": micros(span.start_s),
            "dur": _duration(span),
            "args": _arguments(span),
        }
    for number, message in enumerate(messages_of(trace), 1):
        for letter, span in (("s", message.send), ("f", message.receive)):
            yield {
                "ph": letter,
                **({"bp": "e"} if letter == "f" else {}),
                "name": "message",
                "cat": "message",
                "id": number,
                "pid": span.rank + 1,
                "tid": threads[span],
                "ts": micros(span.start_s),
            }
    for held in trace.held:
        number = held.nbytes
        yield {
            "ph": "C",
            "name": HELD,
            "pid": held.rank + 1,
            "ts": micros(held.at_s),
            "args": {"bytes": number},
        }


def micros(seconds: float) -> float:
    """To the nanosecond."""
    return round(seconds * 1e6, 3)


def _duration(span: Span) -> float:
    """Such that ends that are equal stay equal."""
    return max(round(micros(span.end_s) - micros(span.start_s), 3), _SHORTEST_US)


def _arguments(span: Span) -> Mapping[str, int]:
    made = {"step": span.step}
    if span.nbytes:
        made["bytes"] = span.nbytes
    if span.action is not None:
        made["stage"] = span.action.stage
        if span.action.microbatch is not None:
            made["microbatch"] = span.action.microbatch
    return made


def _named(what: str, rank: int, thread: int = 0, **args: object) -> Event:
    return {"ph": "M", "name": what, "pid": rank + 1, "tid": thread, "args": args}


def _threads(spans: Iterable[Span]) -> dict[Span, int]:
    """The thread of each span: the first of its lane in which none overlaps it."""
    lanes: dict[tuple[int, Lane], list[Span]] = defaultdict(list)
    for span in spans:
        lanes[span.rank, span.lane].append(span)
    found = {}
    for (_, lane), members in lanes.items():
        ends: list[float] = []
        base = 1 + THREADS * list(Lane).index(lane)
        for span in sorted(members, key=lambda span: (span.start_s, span.end_s)):
            start = micros(span.start_s)
            free = (i for i, end in enumerate(ends) if end <= start)
            i = next(free, len(ends))
            if i == len(ends):
                ends.append(0.0)
            ends[i] = start + _duration(span)
            found[span] = base + i
    return found

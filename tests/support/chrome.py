"""Chrome's Trace Event Format, checked: what viewers need to draw a file as it is meant."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def checked(path: Path) -> list[Event]:
    """The events of a file; AssertionError where one breaks the format."""
    given = json.loads(path.read_text(encoding="utf-8"))
    assert given["displayTimeUnit"] in ("ms", "ns")
    assert isinstance(given["otherData"], dict)
    events: list[Event] = given["traceEvents"]
    names = {(e["pid"], e["name"]) for e in events if e["ph"] == "M"}
    slices: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    flows: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        assert event["ph"] in "XMCsf"
        assert event["pid"] > 0  # 0 is the kernel's
        assert (event["pid"], "process_name") in names
        if event["ph"] != "M":
            assert isinstance(event["ts"], int | float)
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] > 0
            assert event["name"]
            thread = event["pid"], event["tid"]
            slices[thread].append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
        elif event["ph"] in "sf":
            flows[event["id"]].append(event)
    for spans in slices.values():
        _check_nesting(spans)
    for start, end in flows.values():
        assert (start["ph"], end["ph"], end["bp"]) == ("s", "f", "e")
        assert (start["name"], start["cat"]) == (end["name"], end["cat"])
        for event in (start, end):
            spans = slices[event["pid"], event["tid"]]
            assert any(a <= event["ts"] < b for a, b in spans), "an arrow at no slice"
    return events


def _check_nesting(spans: list[tuple[float, float]]) -> None:
    """Two slices of a thread may not overlap but for one inside the other."""
    open_: list[float] = []
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_ and open_[-1] <= start + 1e-6:
            open_.pop()
        assert not open_ or end <= open_[-1] + 1e-6, (start, end, open_[-1])
        open_.append(end)

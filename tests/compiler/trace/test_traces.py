"""Planned traces: the simulated step in Chrome's format, and back; what diff says and refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pipecompile.compiler.cli.main import main
from pipecompile.compiler.ir.errors import TraceError
from pipecompile.compiler.report.diff_report import write_difference
from pipecompile.compiler.trace import figures
from pipecompile.compiler.trace.difference import difference
from pipecompile.compiler.trace.planned import planned_trace
from pipecompile.compiler.trace.reading import read_trace
from pipecompile.compiler.trace.replay import resimulated_bubble
from pipecompile.compiler.trace.trace import Lane, Span, Trace, messages_of
from pipecompile.compiler.trace.writing import write_trace
from support.chrome import checked
from support.commands import SMALL_GPT2, inspect
from support.timelines import BACKWARD_S, FORWARD_S, planned


def trace(ranks: int = 2, virtual: int = 2, microbatches: int = 3) -> Trace:
    return planned_trace(*planned(ranks, virtual, microbatches))


def measured(plan: Trace, change: Callable[[Span], Span] = lambda span: span) -> Trace:
    """The plan as if it had run so."""
    header = replace(plan.header, origin="measured")
    return replace(plan, header=header, spans=tuple(map(change, plan.spans)))


@pytest.mark.parametrize(("ranks", "virtual"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_a_file_is_what_viewers_read_and_reads_back(
    tmp_path: Path, ranks: int, virtual: int
) -> None:
    made = trace(ranks, virtual)
    write_trace(made, tmp_path / "plan.json")
    events = checked(tmp_path / "plan.json")
    sent = 2 * 3 * (ranks * virtual - 1)  # (forward, backward) × microbatches × borders
    assert [e["ph"] for e in events].count("s") == sent == len(messages_of(made))
    computed = [e["name"] for e in events if e.get("cat") == "compute"]
    assert sorted(computed) == sorted(
        f"{s}{kind}{i}" for s in range(ranks * virtual) for kind in "FB" for i in range(3)
    )
    back = read_trace(tmp_path / "plan.json")
    assert (back.header, back.ranks) == (made.header, made.ranks)
    assert len(back.spans) == len(made.spans)
    assert figures.bubble_of(back) == pytest.approx(made.header.bubble, abs=1e-6)


def test_ranks_are_named_by_their_stages(tmp_path: Path) -> None:
    write_trace(trace(), tmp_path / "plan.json")
    events = checked(tmp_path / "plan.json")
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["rank 0: stages 0, 2", "rank 1: stages 1, 3"]
    threads = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {"step", "compute", "communication", "replicas and optimizer"} == threads
    assert any(e["ph"] == "C" and e["args"]["bytes"] > 2**30 for e in events)


def test_figures_are_those_of_the_simulated_step() -> None:
    plan, timeline = planned(2, 2, 3)
    made = planned_trace(plan, timeline)
    assert figures.step_seconds(made) == pytest.approx(timeline.step_s)
    assert figures.bubble_of(made) == pytest.approx(timeline.bubble)
    assert figures.closing_seconds(made) == pytest.approx(0.125)
    seconds = figures.compute_seconds(made)
    assert set(seconds.values()) == {FORWARD_S, BACKWARD_S}
    assert resimulated_bubble(made, made) == pytest.approx(timeline.bubble)


def test_waiting_is_the_time_between_computations() -> None:
    """All of it: of what is idle before a rank's last computation, a message ends each part."""
    _, timeline = planned(3, 2, 4)
    waits = figures.waiting(trace(3, 2, 4))
    for rank, row in enumerate(timeline.ranks):
        idle = row[-1].end_s - timeline.busy_s(rank)
        assert sum(s for (r, _), s in waits.items() if r == rank) == pytest.approx(idle)


def test_who_is_slow_is_named() -> None:
    """Rank 1's computations take a second longer, and rank 0 waits for it for as long."""
    plan = trace(2, 1, 1)
    late = {"1F0": 1.0, "1B0": 1.0}  # of one microbatch
    shift = {"1F0": 0.0, "1B0": 1.0, "0B0": 2.0, "1SEND_B0→0": 2.0}

    def slow(span: Span) -> Span:
        start = span.start_s + shift.get(span.name, 0.0)
        end = span.end_s + shift.get(span.name, 0.0) + late.get(span.name, 0.0)
        if span.name == "0RECV_B0←1":
            end += 2.0
        return replace(span, start_s=start, end_s=end)

    found = difference(plan, measured(plan, slow))
    first, second = found.waiting
    assert first.seconds.measured - first.seconds.planned == pytest.approx(2.0)
    assert (first.most_for, second.caused_s) == (1, pytest.approx(first.seconds.measured))
    assert (first.sending_s, second.sending_s) == (0.25, 0.25)  # a message each
    (row,) = (c for c in found.computations if (c.stage, c.kind) == (1, "F"))
    assert row.seconds.ratio == pytest.approx((FORWARD_S + 1) / FORWARD_S)
    assert found.bubble is not None
    assert found.simulated_bubble == pytest.approx(found.bubble.measured)
    stream = io.StringIO()
    write_difference(found, stream, as_json=False)
    assert "5.000 ×" in stream.getvalue()
    assert "rank 1, " in stream.getvalue()


def test_a_message_that_was_late_once_is_so_once() -> None:
    """Not all that go the same way."""
    plan = trace(2, 1, 2)
    delay, end_s = {"0RECV_B0←1": 20.0}, 0.0
    moved: dict[str, Span] = {}
    for span in sorted(
        (s for s in plan.spans if s.rank == 0 and s.action), key=lambda s: s.start_s
    ):
        start_s = max(span.start_s, end_s)
        took_s = 0.0 if "RECV" in span.name else span.seconds
        end_s = max(span.end_s + delay.get(span.name, 0.0), start_s + took_s)
        moved[span.name] = replace(span, start_s=start_s, end_s=end_s)

    found = difference(plan, measured(plan, lambda span: moved.get(span.name, span)))
    assert found.bubble is not None
    assert found.bubble.measured > found.bubble.planned + 0.2
    assert found.simulated_bubble == pytest.approx(found.bubble.measured)


# -- what is refused ------------------------------------------------------------------------------


def same(plan: Trace) -> Trace:
    return plan


def header(**changes: Any) -> Callable[[Trace], Trace]:
    return lambda plan: replace(measured(plan), header=replace(measured(plan).header, **changes))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (same, "both traces are planned: .* pipe.trace"),
        (header(model="Other"), "model Net was planned, and Other ran"),
        (header(placement=((0, 1), (2, 3))), r"stages of ranks 0 2 \| 1 3 was planned, and 0 1"),
        (header(dp=2), r"replicas \(dp\) 1 was planned, and 2 ran"),
        (header(schedule="zb_h1"), "schedule 1f1b was planned, and zb_h1 ran"),
        (header(digest="0"), "their ranks compute in different orders"),
        (
            lambda plan: measured(plan, lambda s: replace(s, name=s.name.replace("step", "eval"))),
            "no training step",
        ),
    ],
)
def test_traces_that_are_not_of_one_pipeline(run: Callable[[Trace], Trace], message: str) -> None:
    plan = trace()
    with pytest.raises(TraceError, match=message):
        difference(plan, run(plan))


def test_traces_in_the_wrong_order() -> None:
    plan = trace()
    with pytest.raises(TraceError, match="swap them"):
        difference(measured(plan), plan)
    with pytest.raises(TraceError, match="both traces are measured"):
        difference(measured(plan), measured(plan))


DAMAGED = (
    (lambda data: "{", "is no trace: it is not JSON"),
    (lambda data: "[1]", "is no trace: it has no traceEvents"),
    (lambda data: json.dumps({"decision": {}}), "is no trace but a plan: .* inspect --plan"),
    (lambda data: json.dumps({"traceEvents": []}), "a trace of another program"),
    (
        lambda data: json.dumps(data | {"otherData": data["otherData"] | {"version": 9}}),
        "version 9",
    ),
    (lambda data: json.dumps(data | {"otherData": data["otherData"] | {"dp": "1"}}), "is damaged"),
    (lambda data: json.dumps(data | {"traceEvents": [{"ph": "X"}]}), "is damaged"),
)


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_files_that_are_no_traces(tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "plan.json"
    write_trace(trace(), path)
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(tmp_path / "none.json"), "run.json"]) == 2
    assert "cannot read the trace" in capsys.readouterr().err


def test_steps_that_are_not_whole() -> None:
    plan = trace()
    run = measured(plan)
    short = replace(run, spans=tuple(s for s in run.spans if s.name != "1B2"))
    with pytest.raises(TraceError, match="rank 1 has measured 11 of 12 computations of step 0"):
        difference(plan, short)
    part = replace(run, ranks=(1,), spans=tuple(s for s in run.spans if s.rank == 1))
    with pytest.raises(TraceError, match="lacks 1 ranks"):
        difference(plan, part)


# -- the command line -----------------------------------------------------------------------------


def test_inspect_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    inspect(f"{SMALL_GPT2} --stages 2 --microbatches 4 --trace {path}", capsys)
    checked(path)
    made = read_trace(path)
    assert figures.bubble_of(made) == pytest.approx(made.header.bubble, abs=1e-4)
    assert figures.step_seconds(made) == pytest.approx(made.header.step_s, rel=1e-4)
    assert {s.lane for s in made.spans} == set(Lane)


def test_a_place_where_nothing_can_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--trace", "--html"):
        code = main(["inspect", *SMALL_GPT2.split(), "--stages", "2", flag, "/nowhere/file"])
        assert code == 2
        assert f"{flag} /nowhere/file: there is no folder" in capsys.readouterr().err

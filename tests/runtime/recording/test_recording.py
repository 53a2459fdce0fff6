"""``with pipe.trace(...)``: what was recorded of real steps, in processes and in one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pipecompile.compiler.cli.main import main
from pipecompile.compiler.ir.actions import from_text
from pipecompile.compiler.ir.errors import BatchError, RankMismatchError, TraceError
from pipecompile.compiler.trace import figures
from pipecompile.compiler.trace.difference import difference
from pipecompile.compiler.trace.reading import read_trace
from pipecompile.compiler.trace.trace import Lane, Trace, messages_of
from pipecompile.runtime.recording import clocks
from pipecompile.runtime.recording.recording import Moment, Part
from pipecompile.runtime.transport.mesh import Mesh
from support import jobs, models, plain
from support.chrome import checked
from support.gang import Gang
from torch.profiler import ProfilerActivity, profile

STEPS, MICROBATCHES = 3, 4


def traced(folder: Path, schedule: str, dp: int) -> tuple[str, ...]:
    """Train inside a trace; the plan's schedule."""
    pipe = jobs.pipeline("gpt2", 2, dp, MICROBATCHES, max_grad_norm=1.0, schedule=schedule)
    batches = models.batches("gpt2", 2 * MICROBATCHES, STEPS)
    pipe.step(batches[0])
    with pipe.trace(folder / "run.json", plan=folder / "plan.json"):
        for batch in batches:
            pipe.step(batch)
        pipe.evaluate(batches[0])
    pipe.step(batches[0])  # is not recorded
    schedule_lines: tuple[str, ...] = pipe.plan.schedule
    return schedule_lines


def check(trace: Trace, schedule: tuple[str, ...], dp: int) -> None:
    """Everything that the schedule says is there, once per step, in its order."""
    actions = from_text("\n".join(schedule))
    assert trace.ranks == tuple(range(2 * dp))
    assert len(trace.steps) == STEPS
    for rank in trace.ranks:
        expected = [str(action) for action in actions[rank % 2]]
        for step in trace.steps:
            mine = [s for s in trace.spans if (s.rank, s.step) == (rank, step)]
            made = Counter(s.name for s in mine if s.action is not None)
            assert made == Counter(expected)
            computed = sorted((s for s in mine if s.lane is Lane.COMPUTE), key=lambda s: s.start_s)
            order = [str(action) for action in actions[rank % 2] if action.kind.computes]
            assert [s.name for s in computed] == order
            (whole,) = (s for s in mine if s.lane is Lane.STEP)
            assert all(whole.start_s <= s.start_s <= s.end_s <= whole.end_s for s in mine)
    evaluated = [s for s in trace.spans if s.lane is Lane.STEP and s.name == "evaluate"]
    assert {s.rank for s in evaluated} == set(trace.ranks)


@pytest.mark.parametrize(
    ("schedule", "dp"), [("1f1b", 1), pytest.param("zb_h1", 1, marks=pytest.mark.slow)]
)
def test_processes_write_one_trace(
    gang: Callable[[int], Gang], tmp_path: Path, schedule: str, dp: int
) -> None:
    planned, *_ = gang(2).run(traced, tmp_path, schedule, dp)
    checked(tmp_path / "run.json")
    run, plan = (read_trace(tmp_path / f"{name}.json") for name in ("run", "plan"))
    check(run, planned, dp)
    assert run.header.complete
    assert not run.header.shared_thread
    assert run.header.memory == "not measured"
    assert not run.held
    sent = messages_of(run)
    assert len(sent) == (2 * STEPS + 1) * MICROBATCHES
    for message in sent:  # no message has come before it left, by clocks that were brought together
        assert message.receive.end_s >= message.send.start_s
        assert message.send.nbytes == message.receive.nbytes > 0
    for rank in run.ranks:  # nothing of a rank overlaps
        mine = [s for s in run.spans if s.rank == rank and s.lane is not Lane.STEP]
        mine = sorted((s for s in mine if s.action is not None), key=lambda s: s.start_s)
        assert all(a.end_s <= b.start_s + 1e-6 for a, b in pairwise(mine))
        others = Counter(s.name for s in run.of(Lane.CLOSING) if s.rank == rank)
        assert (others["clip"], others["optimizer"]) == (STEPS, STEPS)
    found = difference(plan, run)
    assert found.steps == STEPS
    assert found.bubble is not None
    assert 0 < found.bubble.measured < 1
    assert found.simulated_bubble is not None
    assert {(c.stage, c.kind) for c in found.computations} >= {(0, "F"), (0, "B"), (1, "F")}
    assert main(["diff", str(tmp_path / "plan.json"), str(tmp_path / "run.json")]) == 0


@pytest.mark.slow
def test_replicas_are_ranks_of_one_trace(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    planned, *_ = gang(4).run(traced, tmp_path, "1f1b", 2)
    checked(tmp_path / "run.json")
    run = read_trace(tmp_path / "run.json")
    check(run, planned, 2)
    assert Counter(s.name for s in run.of(Lane.CLOSING))["0REDUCE_GRAD"] == 2 * STEPS
    assert difference(read_trace(tmp_path / "plan.json"), run).waiting[3].stages == (1,)


@pytest.mark.slow
def test_one_process_records_all_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = traced(tmp_path, "1f1b", 2)
    checked(tmp_path / "run.json")
    run = read_trace(tmp_path / "run.json")
    check(run, planned, 2)
    assert run.header.shared_thread
    assert main(["diff", str(tmp_path / "plan.json"), str(tmp_path / "run.json")]) == 0
    said = capsys.readouterr().out
    assert "one process has played all ranks" in said
    assert "waiting for messages" not in said
    computed = sorted(run.of(Lane.COMPUTE), key=lambda s: s.start_s)
    assert all(a.end_s <= b.start_s + 1e-6 for a, b in pairwise(computed))


def test_a_trace_changes_no_number(tmp_path: Path) -> None:
    def train(record: bool) -> plain.Trained:
        pipe = jobs.pipeline("gpt2", 2, 1, MICROBATCHES)
        batches = models.batches("gpt2", 2 * MICROBATCHES, 2)
        if not record:
            return plain.train_pipeline(pipe, batches)
        with pipe.trace(tmp_path / "run.json"):
            return plain.train_pipeline(pipe, batches)

    plain.assert_equal(train(True), train(False))


def test_a_loop_of_ones_own_is_recorded(tmp_path: Path) -> None:
    pipe = jobs.pipeline("gpt2", 2, 1, MICROBATCHES)
    with pipe.trace(tmp_path / "run.json"):  # compiles in it
        for batch in models.batches("gpt2", 2 * MICROBATCHES, 2):
            pipe.forward_backward(batch)
            pipe.clip_grad_norm_(1.0)
            pipe.optimizer.step()
            pipe.zero_grad()
    run = read_trace(tmp_path / "run.json")
    assert [s.name for s in run.of(Lane.STEP) if s.rank == 0] == ["step 0", "step 1"]
    assert Counter(s.name for s in run.of(Lane.CLOSING))["optimizer"] == 2
    assert figures.closing_seconds(run) > 0


def test_torchs_profiler_has_the_actions() -> None:
    pipe = jobs.pipeline("gpt2", 2, 2, MICROBATCHES)
    (batch,) = models.batches("gpt2", 4 * MICROBATCHES, 1)
    pipe.step(batch)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        pipe.step(batch)
    names = Counter(event.name for event in seen.events())
    assert names["1F0"] == names["0B3"] == names["0SEND_F2→1"] == 2
    assert names["0REDUCE_GRAD"] >= 2  # a range per piece: ranks take turns


# -- what goes wrong ------------------------------------------------------------------------------


def test_places_and_moments_that_are_refused(tmp_path: Path) -> None:
    pipe = jobs.pipeline("gpt2", 2, 1, MICROBATCHES)
    for path, message in (
        (tmp_path, "is a folder: name a file in it"),
        (tmp_path / "none" / "run.json", "there is no folder .*none"),
    ):
        with pytest.raises(TraceError, match=message), pipe.trace(path):
            raise AssertionError("it began")
    with pytest.raises(TraceError, match=r"trace\(plan=.*there is no folder"):
        pipe.trace(tmp_path / "run.json", plan=tmp_path / "none" / "plan.json").__enter__()
    with pytest.raises(TraceError, match="nothing has run inside"), pipe.trace(tmp_path / "a.json"):
        pass
    with pipe.trace(tmp_path / "run.json"):
        with pytest.raises(TraceError, match="being recorded already"):
            pipe.trace(tmp_path / "other.json").__enter__()
        pipe.step(models.batches("gpt2", 2 * MICROBATCHES, 1)[0])
    assert read_trace(tmp_path / "run.json").steps == (0,)


def test_an_error_inside_leaves_what_there_is(tmp_path: Path) -> None:
    pipe = jobs.pipeline("gpt2", 2, 1, MICROBATCHES)
    (batch,) = models.batches("gpt2", 2 * MICROBATCHES, 1)
    wrong = batch | {"input_ids": torch.full_like(batch["input_ids"], models.VOCABULARY)}
    with pytest.raises(BatchError, match="out of range"):
        record(pipe, tmp_path / "run.json", [batch, wrong])
    run = read_trace(tmp_path / "run.json")
    assert not run.header.complete
    assert "0F0" in {s.name for s in run.of(Lane.COMPUTE)}
    with pipe.trace(tmp_path / "next.json"):  # and another trace begins afresh
        pipe.step(batch)
    assert read_trace(tmp_path / "next.json").header.complete


def record(pipe: Any, path: Path, batches: Iterable[models.Batch]) -> None:
    with pipe.trace(path):
        for batch in batches:
            pipe.step(batch)


def ending_badly() -> Iterator[models.Batch]:
    yield from models.batches("gpt2", 2 * MICROBATCHES, 1)
    raise ZeroDivisionError


def failing(folder: Path) -> None:
    pipe = jobs.pipeline("gpt2", 2, 1, MICROBATCHES)
    with pytest.raises(ZeroDivisionError):
        record(pipe, folder / "run.json", ending_badly())


def test_processes_that_fail_write_their_own_parts(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    gang(2).run(failing, tmp_path)
    assert not (tmp_path / "run.json").exists()
    for rank in range(2):
        part = read_trace(tmp_path / f"run.rank{rank}.json")
        assert (part.ranks, part.header.complete) == ((rank,), False)


def alone(folder: Path) -> str:
    """Rank 0 records, and rank 1 trains."""
    pipe = jobs.pipeline("gpt2", 2, 1, MICROBATCHES)
    (batch,) = models.batches("gpt2", 2 * MICROBATCHES, 1)
    pipe.step(batch)
    begin = pipe.trace(folder / "run.json").__enter__
    with pytest.raises(RankMismatchError) as caught:
        begin() if pipe.is_main else pipe.step(batch)
    return str(caught.value)


def test_a_rank_that_records_alone_does_not_hang(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    for said in gang(2).run(alone, tmp_path):
        assert "rank 0 is in the beginning of trace() (call" in said


def unwritable(folder: Path) -> str:
    pipe = jobs.pipeline("gpt2", 2, 1, MICROBATCHES)
    with pytest.raises(TraceError) as caught:
        pipe.trace(folder / "none" / "run.json").__enter__()
    return str(caught.value)


def test_all_ranks_are_told_that_rank_0_cannot_write(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    for said in gang(2).run(unwritable, tmp_path):
        assert "there is no folder" in said


# -- clocks ---------------------------------------------------------------------------------------


def test_clocks_that_drift_are_brought_together() -> None:
    """A clock that is 1 ms ahead, and 3 ms after ten seconds."""
    part = Part([], Moment(0, 1_000_000), Moment(10**10, 3_000_000))
    assert part.on_first(0) == -1_000_000
    assert part.on_first(5 * 10**9) == 5 * 10**9 - 2_000_000
    assert part.on_first(10**10) == 10**10 - 3_000_000


def apart(ahead: int) -> tuple[int, int]:
    rank = torch.distributed.get_rank()
    real = clocks.time.perf_counter_ns

    def shifted() -> int:
        return real() + (ahead if rank else 0)

    with mock.patch.object(clocks.time, "perf_counter_ns", shifted):
        return clocks.ahead_ns(Mesh(2, 1, rank), None)


@pytest.mark.parametrize("ahead", [0, 3_600 * 10**9, -5 * 10**9])
def test_the_clock_of_another_machine(gang: Callable[[int], Gang], ahead: int) -> None:
    gang(2).run(met)  # they have met
    (first, _), (second, slack) = gang(2).run(apart, ahead)
    assert first == 0
    assert abs(second - ahead) <= slack
    assert slack < 10**8


def met() -> None:
    jobs.pipeline("gpt2", 2, 1, MICROBATCHES)

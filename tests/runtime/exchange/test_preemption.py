"""Stopping in time: what one rank hears, all heed after the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipecompile
import pytest
from pipecompile.errors import OptionError
from pipecompile.runtime.exchange import agreement
from support import jobs, models, plain
from support.gang import Gang
from support.scripts import SMALL

BATCH = models.batches("gpt2", 4, 1)[0]


@contextlib.contextmanager
def listening(*args: Any, **options: Any) -> Iterator[Any]:
    stop = pipecompile.Preemption(*args, **options)
    try:
        yield stop
    finally:
        stop.close()


def compiled(n_stages: int = 2, dp: int = 1) -> Any:
    pipe = jobs.pipeline("gpt2", n_stages, dp, 2)
    pipe.compile_for(share(pipe))
    return pipe


def share(pipe: Any) -> Any:
    return plain.cut(BATCH, pipe.data_shards)[pipe.data_shard]


def stopped(at: int, on: int, name: str, call: str) -> Any:
    """Rank ``on`` gets a signal before step ``at``, the other one a little later."""
    pipe, rank = compiled(), int(os.environ["RANK"])
    with listening() as stop:
        for step in range(6):
            if step == at and rank == on:
                os.kill(os.getpid(), getattr(signal, name))
            if rank != on:
                time.sleep(0.02)
            getattr(pipe, call)(share(pipe))
            if stop.requested:
                return step, stop.reason
    return None


@pytest.mark.parametrize(
    ("on", "name", "call"),
    [(0, "SIGTERM", "step"), (1, "SIGUSR1", "step"), (1, "SIGTERM", "forward_backward")],
)
def test_all_ranks_stop_after_the_same_step(
    gang: Callable[[int], Gang], on: int, name: str, call: str
) -> None:
    assert gang(2).run(stopped, 3, on, name, call) == [(3, f"{name} on rank {on}")] * 2


SCRIPT = (
    """
import sys, time
import pipecompile, torch
"""
    + SMALL
    + """
stop = pipecompile.Preemption()
print("trains", flush=True)
while not stop.requested:
    pipe.step(batch)
    time.sleep(0.01)
pipe.save(sys.argv[1])
print(f"saved: {stop.reason.partition(' ')[0]}\\n", end="", flush=True)  # both at once
"""
)


@pytest.mark.slow
def test_torchrun_passes_the_signal_on(tmp_path: Path) -> None:
    """Its processes save before it ends them."""
    (tmp_path / "train.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [
        *torchrun,
        "--nproc-per-node",
        "2",
        str(tmp_path / "train.py"),
        str(tmp_path / "run"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        seen: list[str] = []
        while seen.count("trains") < 2:
            line = agent.stdout.readline()
            assert line, seen
            seen.append(line.strip())
        agent.send_signal(signal.SIGTERM)
        rest, _ = agent.communicate(timeout=60)
    assert rest.split("\n").count("saved: SIGTERM") == 2
    assert (tmp_path / "run/latest").exists()


def exchanges(listens: bool) -> int:
    pipe, count = compiled(), 0
    gather = agreement.Agreement.gather

    def counted(self: Any, value: Any) -> Any:
        nonlocal count
        count += 1
        return gather(self, value)

    with listening() if listens else contextlib.nullcontext():
        pipe.step(BATCH)
        agreement.Agreement.gather = counted  # type: ignore[method-assign]
        try:
            pipe.step(BATCH)
        finally:
            agreement.Agreement.gather = gather  # type: ignore[method-assign]
    return count


def test_it_costs_no_exchange(gang: Callable[[int], Gang]) -> None:
    assert gang(2).run(exchanges, True) == gang(2).run(exchanges, False)


def test_in_one_process_and_in_evaluation() -> None:
    pipe = compiled()
    with listening() as stop:
        pipe.step(BATCH)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.requested  # until all ranks know
        assert stop.reason == ""
        pipe.evaluate(BATCH)
        assert stop.requested
        assert stop.reason == "SIGTERM on rank 0"


def test_a_time_limit_leaves_room_for_a_save_and_a_step() -> None:
    pipe = compiled()
    with listening(limit_s=3600.0, margin_s=60.0) as early, listening((), limit_s=60.0) as late:
        assert late._end_s < time.monotonic() < early._end_s
        pipe.step(BATCH)
        assert late.reason == "the time limit on rank 0"
    with listening(limit_s=60.5, margin_s=60.0) as stop:
        pipe.step(BATCH)
        assert not stop.requested
        time.sleep(0.3)
        pipe.step(BATCH)  # began 0.3 s after the one before: another one would be too late
        assert stop.requested


def test_the_schedulers_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as stop:
        assert stop._end_s == float("inf")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    with listening(margin_s=300) as stop:
        assert 690 < stop._end_s - time.monotonic() <= 700
    with listening(margin_s=300, limit_s=400) as stop:
        assert 90 < stop._end_s - time.monotonic() <= 100


def test_handlers_that_were_there() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        with listening() as first, listening() as second:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == [signal.SIGUSR1]
            compiled().step(BATCH)
            assert first.requested
            assert second.requested
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signals": ["SIGSTOPPED"]}, "SIGSTOPPED"),
        ({"signals": [15]}, "names of signals"),
        ({"limit_s": -1}, "limit_s=-1"),
        ({"limit_s": float("nan")}, "limit_s=nan"),
        ({"margin_s": True}, "margin_s=True"),
    ],
)
def test_options_that_are_none(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pipecompile.Preemption(**options)


def test_another_thread_hears_no_signals() -> None:
    found: list[str] = []

    def make() -> None:
        try:
            pipecompile.Preemption()
        except OptionError as error:
            found.append(str(error))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in found[0]

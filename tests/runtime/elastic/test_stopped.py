"""A process that is stopped for good is ended by its guard, which ends with it."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pipecompile
import pytest

GUARDING = Path(pipecompile.__file__).parent / "runtime/elastic/guarding.py"
WORKER = """
import runpy, sys, time
guarding = runpy.run_path(sys.argv[1])
guarding["begin"]()
for limit in sys.argv[3:]:
    guarding["allow"](float(limit))
print(*(guard.pid for guard in guarding["_guards"]), flush=True)
time.sleep(float(sys.argv[2]))
"""


def worker(seconds: float, *limits: float) -> tuple[Any, int]:
    """It, and the process of its guard.

    Args:
        limits: what it says that it may be stopped for, one after the other.
    """
    command = [sys.executable, "-S", "-c", WORKER, str(GUARDING), str(seconds), *map(str, limits)]
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "mine", "RANK": "3"}
    process = subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def comes_to(pid: int, states: str, limit_s: float = 20.0) -> bool:
    """Whether a process gets into one of these states, as `/proc` has them; "-" for none."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            state = "-"
        if state in states:
            return True
        time.sleep(0.02)
    return False


def gone(pid: int) -> bool:
    """Within a second; whoever has inherited it may not have looked yet."""
    return comes_to(pid, "-Z", 1.0)


def ignores_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(int(ignored, 16) >> (signal.SIGTERM - 1) & 1)


def test_a_process_that_stays_stopped_is_killed_and_said_so() -> None:
    """Though SIGTERM, which an agent sends to it and its guard, would wait for ever."""
    process, guard = worker(60, 7.0, 0.0)
    while not ignores_sigterm(guard):  # it is meant for the worker
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGSTOP)
    assert comes_to(process.pid, "T")  # or SIGTERM, of the lower number, comes first
    for pid in (process.pid, guard):
        os.kill(pid, signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL
    assert f"rank 3 (process {process.pid}) has been stopped (as by SIGSTOP) for 2 s" in said
    assert "longer than timeout_s=0: it is killed" in said
    assert gone(guard)


def test_a_process_that_is_only_paused_goes_on_and_its_guard_ends_with_it() -> None:
    process, guard = worker(4, 0.0)
    for _ in range(3):
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.8)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.6)  # longer than from one look to the next
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (0, "")
    assert gone(guard)


def test_it_is_guarded_before_it_says_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first import on; and no other process than a worker of torchrun is."""
    script = runpy.run_path(str(GUARDING.with_name("stopped.py")))
    limit = script["_Limit"]()
    assert limit.seconds == script["BEFORE_S"] == 30.0
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reader))
    for said, expected in ((b"8", 30.0), (b".5\n", 10.5), (b"1.0\n3.0\n", 5.0)):
        os.write(writer, said)
        assert limit.hear()
        assert limit.seconds == expected
    os.close(writer)
    assert not limit.hear()
    assert limit.seconds == 5.0

    importing = (
        "import pipecompile.runtime.elastic.guarding as g, sys; "
        "print(len(g._guards), sys.modules.keys() & {'torch'})"
    )
    for run, guards in (("mine", 1), ("", 0)):
        environment = {**os.environ, "TORCHELASTIC_RUN_ID": run, "RANK": "0"}
        if not run:
            del environment["TORCHELASTIC_RUN_ID"]
        ran = subprocess.run(
            [sys.executable, "-c", importing], env=environment, capture_output=True, text=True
        )
        assert (ran.stdout, ran.stderr) == (f"{guards} set()\n", "")

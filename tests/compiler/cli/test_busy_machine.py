"""A plan is that of the model: what else the machine does while it is made changes no byte."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SPIN = "while True: pass"
# recomputation within a budget, reserves, drafts and the local search
COMMAND = "hf:gpt2 --stages 4 --memory 1.5GiB --microbatches 8 --batch 8 --seq 256"


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many processes that take all that they get, at the priority of those that plan."""
    beside = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in beside:
            process.kill()
            process.wait()


def planned(command: str, cache: Path) -> str:
    """By a process of its own, without anything that others have kept."""
    own = os.environ | {"PIPECOMPILE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "pipecompile", "inspect", *command.split(), "--json"]
    return subprocess.run(line, env=own, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_plan_beside_two_spinning_processes_is_that_of_an_idle_machine(tmp_path: Path) -> None:
    idle = planned(COMMAND, tmp_path / "idle")
    with spinning(2):
        busy = planned(COMMAND, tmp_path / "busy")
    assert busy == idle

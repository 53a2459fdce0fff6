"""Whole runs under torchrun's elastic agents whose processes and machines are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import hosts
from support.elastic import LINE, NetworkRun, Run, children, script_of

STEPS = 24
SAME, OTHER = "(2, 2)", "(2, 3)"

pytestmark = pytest.mark.slow


def run(folder: Path, count: int, stages: str = SAME, options: str = "{}", **more: Any) -> Run:
    return Run([script_of(folder), str(STEPS), stages, options], folder, count, 2, **more)


def curve_of(folder: Path, count: int, stages: str = SAME) -> dict[int, str]:
    """Of a run that nothing happens to."""
    with run(folder, count, stages) as undisturbed:
        assert set(undisturbed.finished()) == {0}
        assert undisturbed.left == []
        return undisturbed.curve


def sources(went: Run) -> list[str]:
    return [line for line in went.said if line.startswith("from ")]


def repeated(went: Run) -> int:
    """Steps that were done twice."""
    return len(went.steps) - len(went.curve)


def test_killed_workers_cost_a_step_at_most_and_no_bit(tmp_path: Path) -> None:
    """One after the other, of one machine's two; the script's own random numbers go on too."""
    expected = curve_of(tmp_path, 2)
    with run(tmp_path, 2) as went:
        for rank, step, restarts in ((1, 5, 1), (0, 12, 2)):
            went.reached(step)
            os.kill(went.workers[rank], signal.SIGKILL)
            went.restarted(restarts)
        assert set(went.finished()) == {0}
        assert went.curve == expected
        assert [line.split()[1] for line in sources(went)] == ["nothing", "memory", "memory"]
        assert repeated(went) <= 2
        assert went.left == []


def test_three_kills_in_a_row_cost_what_one_does(tmp_path: Path) -> None:
    """The second and the third meet a run that is being started anew."""
    with run(tmp_path, 2) as went:
        went.reached(8)
        for rank in (1, 0, 0):
            went.wait_for(lambda rank=rank: rank in went.workers, 60, f"rank {rank}")  # type: ignore[misc]
            os.kill(went.workers[rank], signal.SIGKILL)
            time.sleep(2.0)
        assert set(went.finished(240)) == {0}
        assert {begun.source for begun in went.begun[1:]} == {"memory"}
        assert max(begun.lost for begun in went.begun) <= 2
        assert sorted(went.curve) == list(range(STEPS))


def test_a_worker_that_is_stopped_while_it_imports_is_ended_by_its_guard(tmp_path: Path) -> None:
    """The one that waits for it ends by itself, and does not wait for torch's minutes."""
    with run(tmp_path, 2, options=repr({"timeout_s": 10.0})) as went:
        went.wait_for(lambda: 1 in went.workers, 60, "rank 1")
        worker = went.workers[1]
        went.wait_for(lambda: children(worker) != [], 60, "its guard")
        os.kill(worker, signal.SIGSTOP)
        went.reached(2, 110)
        said = "\n".join(went.said)
        assert "longer than 30 s, which it may be before session.compile()" in said
        assert "PeerFailedError: rank 0 " in said or "PeerFailedError: rank 1 " in said
        went.finished()


def test_a_machine_is_lost_with_its_memory_and_comes_back(tmp_path: Path) -> None:
    """Three stages, then two, then three again: with one replica always, so that no bit changes."""
    expected = curve_of(tmp_path, 2)
    gate = tmp_path / "gate"
    with run(tmp_path, 3, OTHER, environment={"GATE": str(gate)}) as went:
        went.reached(4)
        machine = went.machine_of(2)
        went.lose(machine)
        went.restarted(1)
        went.start(machine)
        went.restarted(2)
        gate.touch()
        assert set(went.finished()) == {0}
        assert [line.split()[1] for line in sources(went)] == ["nothing", "memory", "memory"]
        assert [line.split(" as ")[1] for line in sources(went)] == ["3 x 1", "2 x 1", "3 x 1"]
        assert went.curve == expected
        assert repeated(went) <= 2
        assert went.left == []


def test_what_is_too_many_waits_and_takes_a_lost_ones_place(tmp_path: Path) -> None:
    expected = curve_of(tmp_path, 2)
    with run(tmp_path, 3) as went:
        went.reached(5)
        went.lose(went.machine_of(1))
        assert set(went.finished()) == {0}
        assert went.curve == expected
        assert [line.split()[1] for line in sources(went)] == ["nothing", "memory"]
        assert any("rank 2 waits" in line for line in went.said)


def test_everything_is_lost_but_the_disk(tmp_path: Path) -> None:
    expected = curve_of(tmp_path, 2)
    disk = repr({"session": {"directory": str(tmp_path / "run"), "save_every": 3}})
    with run(tmp_path, 2, SAME, disk) as went:
        went.reached(8)
        for machine in went.machines:
            went.stop(machine)  # the memory stays, and belongs to agents that are no more
        assert len(went.left) == 2
        for machine in went.machines:
            went.start(machine)
        assert set(went.finished()) == {0}
        assert went.curve == expected
        assert sources(went)[-1].startswith("from disk after 6")
        assert went.left == []


def test_a_machine_whose_cable_is_cut_is_lost_and_comes_back(tmp_path: Path) -> None:
    """Its processes live on, and train no step alone; the others go on without them."""
    if reason := hosts.lacking():
        pytest.skip(reason)
    command = [script_of(tmp_path), str(STEPS), OTHER, repr({"timeout_s": 8.0})]
    alone = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    found = map(LINE.match, alone.stdout.splitlines())
    expected = {int(each[1]): each[2].strip() for each in found if each}
    gate = tmp_path / "gate"
    more: Any = {"environment": {"GATE": str(gate)}, "fewest": 2}
    with hosts.network(3) as made, NetworkRun(command, tmp_path, 3, network=made, **more) as went:
        went.reached(4)
        made.cut(made.hosts[2])
        went.restarted(1, 180)
        went.stop(went.machines[2])
        made.mend(made.hosts[2])
        went.start(went.machines[2])
        went.restarted(2, 180)
        gate.touch()
        assert set(went.finished()) == {0}
        assert [line.split()[1] for line in sources(went)] == ["nothing", "memory", "memory"]
        assert [line.split(" as ")[1] for line in sources(went)] == ["3 x 1", "2 x 1", "3 x 1"]
        assert went.curve == expected
        assert any("on host2), which has not been heard of for" in line for line in went.said)
        assert repeated(went) <= 2
        assert went.left == []

"""Whose memory it is that is found on a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipecompile.runtime.elastic import memory
from pipecompile.runtime.elastic.holdings import Held, complete
from pipecompile.runtime.elastic.memory import PREFIX, Memory, sealed
from pipecompile.runtime.files.owner import began
from support.snapshots import memory_in

PIECE = Held("00000001-a", 0, 7, 1, 0)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with memory_in(tmp_path):
        yield tmp_path


def made(run: str, agent: str | None = None) -> Memory:
    """The memory of a run, with a piece; signed by this process's agent, or by another."""
    found = Memory.of(run)
    found.begin(PIECE)
    found.publish(PIECE, sealed(PIECE, {}))
    if agent is not None:
        signatures = found.folder / "agents"
        next(signatures.iterdir()).rename(signatures / agent)
    return found


def ended() -> str:
    """The signature of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    since = began(process.pid)
    process.communicate(b"\n")
    return f"{process.pid}-{since}-{memory._space()}"


def test_what_the_same_agent_has_signed_is_this_runs() -> None:
    made("one")
    found = memory.look()
    assert found.mine == ("one",)
    assert found.held["one"] == (PIECE,)


def test_what_another_agent_has_left_is_seen_and_is_not_ours() -> None:
    """Its pieces count where ranks of other machines know the run: a machine has come back."""
    made("one", ended())
    found = memory.look()
    assert found.mine == ()
    assert found.held["one"] == (PIECE,)


def test_what_dead_runs_have_left_is_removed(folder: Path) -> None:
    made("stale", ended())
    made("reused", ended().replace("-", "-1", 1))  # the number is another process's now
    (folder / f"{PREFIX}empty").mkdir()
    memory.clear("mine")
    assert list(folder.iterdir()) == []


def test_what_may_be_alive_stays(folder: Path) -> None:
    made("mine", ended())
    made("others", f"{os.getpid()}-{began(os.getpid())}-{memory._space()}")
    made("container", "4711-99-1")
    memory.clear("mine")
    assert len(list(folder.iterdir())) == 3


def test_links_are_left_alone(folder: Path) -> None:
    """Where anybody may make anything."""
    (folder / "elsewhere").mkdir()
    made("stale", ended()).folder.rename(folder / "elsewhere" / "run")
    (folder / f"{PREFIX}link").symlink_to(folder / "elsewhere" / "run")
    assert memory.look().held == {}
    memory.clear("mine")
    assert (folder / "elsewhere" / "run" / "agents").is_dir()


def test_damage_is_no_piece() -> None:
    path = made("one").place(PIECE).with_suffix(".json")
    path.write_text(path.read_text().replace("7", "8", 1))
    assert memory.look().held["one"] == ()


def test_only_one_snapshot_of_other_attempts_stays() -> None:
    mine = made("one")
    for attempt, sequence in (("00000001-a", 1), ("00000002-a", 0), ("00000002-a", 1)):
        piece = Held(attempt, sequence, 8, 1, 0)
        mine.begin(piece)
        mine.publish(piece, sealed(piece, {}))
    found = next(
        s for s in complete([list(memory.held_in(mine.folder))]) if s.attempt == "00000001-a"
    )
    mine.keep((), found)
    assert {(h.attempt, h.sequence) for h in memory.held_in(mine.folder)} == {
        (found.attempt, found.sequence)
    }
    mine.keep(("00000003-a",))
    assert list(memory.held_in(mine.folder)) == []
    assert memory.look().mine == ("one",), "the signature stays"
    mine.remove()
    assert not mine.folder.exists()

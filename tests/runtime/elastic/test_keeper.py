"""Snapshots that are torn by a kill are never used, and there always is a whole one."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipecompile import errors
from pipecompile.runtime.elastic import memory as elastic_memory
from pipecompile.runtime.elastic import piece
from pipecompile.runtime.elastic.holdings import Held
from pipecompile.runtime.elastic.memory import Memory
from pipecompile.runtime.elastic.piece import Room
from support import snapshots
from support.snapshots import keeper, newest, simple, training, values

STEPS = 3
PLACES = (
    (Memory, "begin"),
    (Room, "of"),
    (piece, "copy"),
    (piece, "described"),
    (Memory, "publish"),
    (elastic_memory, "_written_over"),
    (Path, "write_bytes"),
    (Path, "replace"),
)
"""What a process may be killed before, in and after."""


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with snapshots.memory_in(tmp_path), simple():
        yield Memory.of("r")


def torn(form: Any, tensors: Any, room: Room) -> None:
    """Half of a copy."""
    target = room.view(form.starts["model.w"], form.specs["model.w"])
    target[: len(target) // 2] = tensors["model.w"][: len(target) // 2]


def killed_at(moment: int, memory: Memory, told: int) -> bool:
    """Keep some steps in a process that is killed at the n-th moment; whether it was. After each
    step that is over it writes a byte to ``told``."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    left = moment

    def tick() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)

    def wrapped(owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def act(*args: Any, **options: Any) -> Any:
            tick()
            if name == "copy" and left == 0:
                torn(*args)
                tick()
            found = original(*args, **options)
            tick()
            return found

        return act

    with ExitStack() as stack:
        for owner, name in PLACES:
            made = wrapped(owner, name)
            as_it_is = staticmethod(made) if (owner, name) == (Room, "of") else made
            stack.enter_context(mock.patch.object(owner, name, as_it_is))
        mine = keeper(memory)
        for step in range(STEPS):
            os.write(told, bytes([step]))
            mine.take(training(step))
        mine.wait()
        os._exit(0)


def test_there_is_a_whole_snapshot_whenever_a_process_is_killed(memory: Memory) -> None:
    moment, killed = 0, True
    while killed:
        shutil.rmtree(memory.folder / snapshots.ATTEMPT, ignore_errors=True)
        reader, writer = os.pipe()
        killed = killed_at(moment, memory, writer)
        last = os.read(reader, STEPS)[-1]
        os.close(reader)
        os.close(writer)
        found = newest(memory)
        if found is None:
            assert last < 2, f"nothing was left at moment {moment}, in step {last}"
        else:
            assert found.steps >= last - 2, f"moment {moment}, in step {last}: {found}"
            whole = torch.full((256, 4), float(found.steps))
            assert torch.equal(values(memory, found), whole), f"moment {moment}"
        moment += 1
    assert moment > 30, "it was not killed everywhere"
    assert found is not None
    assert found.steps == STEPS - 1


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_changed_byte_is_found(memory: Memory, data: st.DataObject) -> None:
    mine = keeper(memory)
    mine.take(training(3))
    mine.wait()
    found = newest(memory)
    assert found is not None
    path = memory.place(found.piece(0))
    facts = data.draw(st.booleans())
    path = path.with_suffix(".json") if facts else path
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    after = newest(memory)
    assert (after is None) == facts
    if after is not None:
        with pytest.raises(errors.CheckpointError, match="damaged"):
            values(memory, after)


def test_two_generations_take_turns(memory: Memory) -> None:
    mine = keeper(memory)
    for step in range(5):
        mine.take(training(step))
    mine.wait()
    kept = sorted(h.steps for h in snapshots.held_in(memory.folder))
    assert kept == [3, 4]
    assert mine.complete == 5


def test_state_that_grows_gets_other_room(memory: Memory) -> None:
    """As an optimizer's does in its first step."""
    mine = keeper(memory)
    for step, rows in enumerate((4, 256, 256, 8)):
        mine.take(training(step, rows))
    mine.wait()
    found = newest(memory)
    assert found is not None
    assert torch.equal(values(memory, found), torch.full((8, 4), 3.0))


def test_without_room_the_last_whole_snapshot_stays(memory: Memory) -> None:
    """However often it is tried again; and once there is room, it goes on."""
    mine = keeper(memory)
    mine.take(training(0))
    full = mock.patch.object(os, "posix_fallocate", side_effect=OSError(28, "No space left"))
    for step in (1, 2, 3):
        with full:
            mine.take(training(step))
            mine.wait()
        assert "no room" in mine.lack
        found = newest(memory)
        assert found is not None
        assert found.steps == 0
        assert torch.equal(values(memory, found), torch.zeros(256, 4))
    mine.take(training(4))
    mine.wait()
    found = newest(memory)
    assert found is not None
    assert (found.steps, mine.lack) == (4, "")


def test_a_run_that_has_begun_takes_no_more_memory(memory: Memory) -> None:
    """Once it has both generations, others may fill what is left: here no file may grow."""
    mine = keeper(memory)
    for step in (8, 9):
        mine.take(training(step))
    mine.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        for step in (10, 11, 12):
            mine.take(training(step))
        mine.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = newest(memory)
    assert found is not None
    assert (found.steps, mine.complete, mine.lack) == (12, 5, "")
    assert torch.equal(values(memory, found), torch.full((256, 4), 12.0))


def test_what_is_in_a_wrong_place_is_no_piece(memory: Memory) -> None:
    """A JSON that says it is another rank's, or of the other slot."""
    mine = keeper(memory)
    mine.take(training(0))
    mine.wait()
    path = memory.place(Held(snapshots.ATTEMPT, 0, 0, 1, 0)).with_suffix(".json")
    path.rename(path.with_name("part-00001.json"))
    assert newest(memory) is None

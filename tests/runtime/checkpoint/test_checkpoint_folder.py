"""The folder of checkpoints: complete or not there, whatever dies, fills up or runs beside it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pipecompile
import pytest
from pipecompile import errors
from pipecompile.runtime.checkpoint import background, storage
from pipecompile.runtime.files import step_folder, tensor_file
from support.checkpoints import (
    INDEX,
    OPTIMIZERS,
    PART,
    Small,
    pipeline,
    refused,
    resumed,
    rows,
    small,
    steps,
)
from support.gang import Gang
from support.matrix import quickly
from support.plain import equal


def shown(folder: Path) -> list[str]:
    """What is in a folder but for who owns it."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".owner")


# -- the folder --------------------------------------------------------------------------------


def test_keep_latest_and_single_steps(tmp_path: Path) -> None:
    pipe = small(1, OPTIMIZERS["sgd"])
    folders = []
    for step in range(4):
        pipe.step(rows(step))
        folders.append(pipe.save(tmp_path, keep=2))
    names = ["latest", "step-00000003", "step-00000004"]
    assert shown(tmp_path) == names
    assert (tmp_path / "latest").read_text().strip() == "step-00000004"
    assert pipe.load(folders[2]) == 3
    assert pipe.load(tmp_path) == 4
    (tmp_path / "latest").write_text("../elsewhere")
    assert pipe.load(tmp_path) == 4
    (tmp_path / "latest").write_text("step-00000003")
    assert pipe.load(tmp_path) == 3
    pipe.save(tmp_path, keep=1)  # step 3 anew; step 4 came after it and stays
    assert shown(tmp_path) == names
    assert pipe.load(tmp_path) == 3
    with pytest.raises(errors.OptionError, match="keep=0 must be at least 1"):
        pipe.save(tmp_path, keep=0)


def test_everything_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, then the folder that they are in, then its new name; and the same of ``latest``."""
    done: list[str] = []

    def name(path: Any) -> str:
        plain = re.sub(r"\.tmp-\w+", ".tmp", str(path).removeprefix(str(tmp_path)))
        return plain.lstrip("/") or "."

    def watch(call: str, shown: Callable[..., str]) -> None:
        real = getattr(os, call)

        def watched(*args: Any, **options: Any) -> Any:
            done.append(shown(*args))
            return real(*args, **options)

        monkeypatch.setattr(os, call, watched)

    pipe = small(2, OPTIMIZERS["momentum"])
    watch("fsync", lambda handle: f"sync {name(Path(f'/proc/self/fd/{handle}').readlink())}")
    for call in ("rename", "replace"):
        watch(call, lambda old, new: f"{name(old)} -> {name(new)}")
    pipe.save(tmp_path)
    assert done == [
        f"sync .step-00000000.tmp/{PART}",
        f"sync .step-00000000.tmp/{INDEX}",
        "sync .step-00000000.tmp",
        ".step-00000000.tmp -> step-00000000",
        "sync .",
        "sync .latest.tmp",
        ".latest.tmp -> latest",
        "sync .",
    ]


def test_only_the_temporaries_of_dead_runs_are_removed(tmp_path: Path) -> None:
    pipe = small(1, OPTIMIZERS["sgd"])
    dead = step_folder.Draft.begin(tmp_path, 7)
    living = step_folder.Draft.begin(tmp_path, 8)
    dead._lock.close()
    pipe.save(tmp_path)
    assert not dead.path.exists()
    assert living.path.exists()
    assert pipe.load(tmp_path) == 0
    living.discard()
    assert not living.path.exists()


def test_before_the_first_batch() -> None:
    pipe = pipecompile.compile(Small(), 1)
    for call in (pipe.save, pipe.load):
        with pytest.raises(errors.NotCompiledError, match="compile_for"):
            call("nowhere")


KILLED = """
import gc, os, random, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from support import checkpoints as here

folder, moments = Path({folder!r}), {moments}
pipe = here.small(2, here.OPTIMIZERS["momentum"])
reader = here.small(1, here.OPTIMIZERS["momentum"])
losses = [pipe.step(here.rows(step)) for step in range(1)]
pipe.save(folder)
truth = {{1: pipe.state_dict()}}

def let_go():  # so that a fork may write there
    for each in (pipe, reader):
        each._checkpoints._owners.clear()
    gc.collect()
    assert not (folder / ".owner").exists()

let_go()
child = os.fork()
if not child:  # an exit waits for what is being written
    pipe.save(folder / "exit", async_save=True)
    del pipe
    sys.exit()
os.waitpid(child, 0)
assert reader.load(folder / "exit") == 1

def saves():
    while True:  # the same step twice, then the next
        for _ in range(2):
            pipe.save(folder, keep=2)
        pipe.step(here.rows(pipe._steps))

def truth_of(step):
    while pipe._steps < step:
        pipe.step(here.rows(pipe._steps))
        truth[pipe._steps] = pipe.state_dict()
    return truth[step]

watched = ("open", "shutil.rmtree")
watched += tuple("os." + call for call in ("rename", "link", "remove", "mkdir", "rmdir"))

def after(count):
    def count_down(event, args):
        nonlocal count
        if event in watched:
            count -= 1
            if not count:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count_down)

for moment in moments:
    child = os.fork()
    if not child:
        if isinstance(moment, int):
            after(moment)
        saves()
    if not isinstance(moment, int):
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    step = reader.load(folder)
    assert here.plain.equal(reader.state_dict(), truth_of(step)), moment
    for path in folder.glob("step-*"):
        reader.load(path)  # whatever is published is complete
    reader.load(folder)
    reader.save(folder, keep=1)
    let_go()
    litter = [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert not litter, (moment, litter)
    pipe.load(folder)
print("survived", len(moments))
"""


def kill_at(folder: Path, moments: list[float | int]) -> None:
    """Kill a saving process at each moment, and load: seconds, or how many file operations."""
    script = KILLED.format(
        tests=str(Path(__file__).parents[2]), folder=str(folder), moments=repr(moments)
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert f"survived {len(moments)}" in done.stdout


@pytest.mark.parametrize("step", quickly([30], [1, 20, 30]))
def test_killed_at_any_moment(tmp_path: Path, step: int) -> None:
    """Before every single file operation of saving anew, replacing and removing; and in time."""
    kill_at(tmp_path, [*range(1, 60, step), *(0.01, 0.02, 0.03, 0.05, 0.08)[::step]])


@pytest.mark.slow
def test_killed_at_many_moments(tmp_path: Path) -> None:
    kill_at(tmp_path, [*range(1, 150), *(0.005 * i for i in range(1, 21))])


# -- in the background -------------------------------------------------------------------------


def test_saving_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is the moment of the call; a second save waits for the first."""
    write = tensor_file.write

    def slowly(*args: Any) -> Any:
        time.sleep(0.3)
        return write(*args)

    monkeypatch.setattr(tensor_file, "write", slowly)
    pipe = small(2, OPTIMIZERS["momentum"])
    pipe.step(rows(0))
    expected = pipe.state_dict()
    start = time.monotonic()
    folder = pipe.save(tmp_path, async_save=True)
    assert time.monotonic() - start < 0.25
    pipe.step(rows(1))
    assert not folder.exists()
    pipe.save(tmp_path, async_save=True)
    assert folder.exists()
    pipe.wait_for_save()
    other = small(1, OPTIMIZERS["momentum"])
    assert other.load(folder) == 1
    assert equal(other.state_dict(), expected)
    assert other.load(tmp_path) == 2


def in_the_background(directory: str) -> Any:
    """Training goes on beside the save, over the same processes."""
    pipe = pipeline(2, 1)
    steps(pipe, 0, 2)
    pipe.save(directory, async_save=True)
    losses = steps(pipe, 2, 4)
    pipe.wait_for_save()
    return losses, pipe.state_dict()


def test_background_between_processes(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    expected = gang(2).run(in_the_background, str(tmp_path))[0]
    assert equal(resumed(str(tmp_path), 1, 1), expected)


# -- a full disk -------------------------------------------------------------------------------


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """New parts go to /dev/full, where every write fails with ENOSPC."""
    open_ = Path.open

    def full(path: Path, mode: str = "r", **options: Any) -> Any:
        if path.name.startswith("part-") and "x" in mode:
            return open_(Path("/dev/full"), "wb", **options)
        return open_(path, mode, **options)

    monkeypatch.setattr(Path, "open", full)


def full_disk(directory: str) -> list[str]:
    """Only rank 1's disk is full; what both ranks say, at once and from the background."""
    pipe = pipeline(2, 1)
    pipe.save(directory)
    steps(pipe, 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            fill_disk(patch)
        first = refused(lambda: pipe.save(directory, keep=1))
        pipe.save(directory, keep=1, async_save=True)
        second = refused(pipe.wait_for_save)
        pipe.save(directory, keep=1, async_save=True)
        third = refused(lambda: pipe.save(directory, keep=1))
    assert pipe.load(directory) == 0
    steps(pipe, 0, 1)  # and training goes on
    return [first, second, third]


def test_a_full_disk_is_an_error_on_every_rank(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    for answer in gang(2).run(full_disk, str(tmp_path)):
        for message in answer:
            assert "rank 1 cannot write" in message
            assert "No space left on device; the checkpoints before it are as they were" in message
    assert shown(tmp_path) == ["latest", "step-00000000"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_of_a_save_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """And costs no checkpoint but the one that was being written."""
    pipe = small(1, OPTIMIZERS["sgd"])
    pipe.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(storage.Writer, "_written", mock.Mock(side_effect=kind))
        with pytest.raises(kind):
            pipe.save(tmp_path)
    assert pipe.load(tmp_path) == 0
    assert not list(tmp_path.glob(".step-*"))
    pipe.save(tmp_path)


def test_an_error_that_nobody_waits_for_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = small(1, OPTIMIZERS["sgd"])
    fill_disk(monkeypatch)
    pipe.save(tmp_path, async_save=True)
    with pytest.raises(errors.CheckpointError):
        pipe._checkpoints._background.wait()
    background._report()
    assert not capsys.readouterr().err
    pipe.save(tmp_path, async_save=True)
    pipe._checkpoints._background._thread.join()
    background._report()
    assert "a save in the background failed: rank 0 cannot write" in capsys.readouterr().err
    with pytest.raises(errors.CheckpointError):
        pipe.wait_for_save()

"""Two runs in one folder: the second is told whose it is; what the dead have left is taken over."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from pipecompile import errors
from pipecompile.runtime.files import owner, step_folder
from support.checkpoints import OPTIMIZERS, refused, rows, small
from support.plain import equal

OTHER = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from pipecompile.runtime.files import owner
mine = owner.own(Path(sys.argv[1]))
print("owns", flush=True)
time.sleep(60)
"""


def other(folder: Path) -> subprocess.Popen[str]:
    """Another run that has the folder."""
    done = subprocess.Popen(
        [sys.executable, "-c", OTHER.format(paths=sys.path), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout is not None
    assert done.stdout.readline() == "owns\n"
    return done


def test_another_run_is_told_whose_the_folder_is(tmp_path: Path) -> None:
    """Through a link too; reading asks nobody; a killed owner's is taken over."""
    pipe = small(1, OPTIMIZERS["sgd"])
    folder = tmp_path / "run"
    pipe.save(folder)
    del pipe
    gc.collect()
    (tmp_path / "link").symlink_to(folder)
    second = small(1, OPTIMIZERS["sgd"])
    process = other(folder)
    try:
        for given in (folder, tmp_path / "link"):
            said = refused(lambda g=given: second.save(g))
            assert f"{given} belongs to process {process.pid} on " in said
            assert "give every run a folder of its own" in said
            assert "remove" not in said
            assert second.load(given) == 0
    finally:
        process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / owner.OWNER).exists()
    second.save(folder)
    assert json.loads((folder / owner.OWNER).read_text())["pid"] == os.getpid()


def claim(folder: Path, **changes: Any) -> None:
    about = {**owner._about_me(), **changes}
    (folder / owner.OWNER).write_text(json.dumps(about))


def test_who_is_known_to_be_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = {"pid": os.getppid(), "began": owner.began(os.getppid())}
    far = {"host": "node7", "boot": "another", "machine": "another", "run": "r1", "attempt": "0"}
    own = owner.own
    claim(tmp_path, **alive)
    assert "remove" not in refused(lambda: own(tmp_path))
    claim(tmp_path, **alive, space="pid:[1]")  # of a container: nothing can be told
    assert f"remove {tmp_path / owner.OWNER}" in refused(lambda: own(tmp_path))
    claim(tmp_path, **far)
    said = refused(lambda: own(tmp_path))
    assert "on node7" in said
    assert f"if it does not run any more, remove {tmp_path / owner.OWNER}" in said
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "r1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "on node7" in refused(lambda: own(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    dead = [far, {**alive, "began": "1"}, {**alive, "pid": 2**22 + 1}, {"pid": "x"}]
    if owner._about_me()["machine"]:
        dead.append({**alive, "boot": "the one before", "at": owner.booted_s() - 1})
        for at in (owner.booted_s() + 1, None):  # another machine, of the same name and image
            claim(tmp_path, **alive, boot="another", at=at, attempt="1")
            assert "if it does not run any more, remove" in refused(lambda: own(tmp_path))
    for each in dead:
        claim(tmp_path, **each)
        assert own(tmp_path).pid == os.getpid()
    for text in ("", "[]", "{", "null"):
        (tmp_path / owner.OWNER).write_text(text)
        assert own(tmp_path).pid == os.getpid()
        assert not (tmp_path / owner.OWNER).exists()


def test_an_elastic_run_takes_over_from_a_machine_that_it_has_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose agent has counted more attempts than the one that is left."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "r1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setitem(owner._names, "elastic", "")
    far = {"host": "node7", "boot": "another", "machine": "another", "run": "r1", "attempt": "3"}
    for elastic in ({}, {"elastic": ""}, {"elastic": "another"}):
        owner.same_run("")
        claim(tmp_path, **far, **elastic)
        assert "on node7" in refused(lambda: owner.own(tmp_path))
        owner.same_run("mine")
        assert "on node7" in refused(lambda: owner.own(tmp_path))
    claim(tmp_path, **far, elastic="mine")
    assert owner.own(tmp_path).pid == os.getpid()
    alive = {"pid": os.getppid(), "began": owner.began(os.getppid())}
    (tmp_path / "other").mkdir()
    claim(tmp_path / "other", **alive, elastic="mine")  # it is seen to live
    assert "process" in refused(lambda: owner.own(tmp_path / "other"))


def test_a_folder_is_let_go_with_the_last_pipeline(tmp_path: Path) -> None:
    """But not while one is still being written in the background, and not by a fork."""
    one, two = (small(1, OPTIMIZERS["sgd"]) for _ in range(2))
    one.save(tmp_path)
    two.save(tmp_path, async_save=True)
    two.wait_for_save()
    del one
    gc.collect()
    assert (tmp_path / owner.OWNER).exists()
    if not (child := os.fork()):
        two._checkpoints._owners.clear()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / owner.OWNER).exists()
    del two
    gc.collect()
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_a_folder_that_was_removed_is_owned_anew(tmp_path: Path) -> None:
    pipe = small(1, OPTIMIZERS["sgd"])
    pipe.save(tmp_path)
    (tmp_path / owner.OWNER).unlink()
    claim(tmp_path, host="node7", boot="another", machine="another")
    assert "belongs to process" in refused(lambda: pipe.save(tmp_path))
    (tmp_path / owner.OWNER).unlink()
    pipe.save(tmp_path)


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", never)
    mine = owner.own(tmp_path)
    assert owner.own(tmp_path) is mine
    claim(tmp_path, pid=os.getppid(), began=owner.began(os.getppid()))
    assert "belongs to" in refused(lambda: owner.own(tmp_path))


# -- links, and full disks ---------------------------------------------------------------------


def test_keep_removes_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    pipe = small(1, OPTIMIZERS["sgd"])
    folder, archive = tmp_path / "run", tmp_path / "archive"
    pipe.save(folder).rename(archive)
    (folder / "step-00000000").symlink_to(archive)
    assert pipe.load(folder) == 0
    pipe.save(folder)  # the same step: a folder in the place of the link
    assert not (folder / "step-00000000").is_symlink()
    step_folder._remove(folder / "step-00000000")
    (folder / "step-00000000").symlink_to(archive)
    (folder / "step-00000000.replaced").symlink_to(tmp_path / "nowhere")
    (folder / ".step-00000009.tmp-0").symlink_to(archive)
    pipe.step(rows(0))
    pipe.save(folder, keep=1)
    names = {path.name for path in folder.iterdir()} - {"step-00000000.replaced"}
    assert names == {".owner", "latest", "step-00000001"}
    assert pipe.load(archive) == 0


def test_no_bit_of_latest_names_another_step(tmp_path: Path) -> None:
    """Of steps whose names are a bit apart; and of a run that has gone back to an earlier one."""
    steps = (1, 2, 3, 5, 9)
    for step in steps:
        (tmp_path / step_folder.step_name(step)).mkdir()
        (tmp_path / step_folder.step_name(step) / step_folder.INDEX).touch()
    latest = tmp_path / step_folder.LATEST
    for step in steps:
        step_folder._point_latest(tmp_path, step_folder.step_name(step))
        whole = latest.read_bytes()
        assert len(whole) <= 100, "which is what versions without a checksum read"
        for bit in range(8 * len(whole)):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            latest.write_bytes(flipped)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found, said = "", ""
                try:
                    found = step_folder.find(tmp_path).name
                except errors.CheckpointError as error:
                    said = str(error)
            assert found == step_folder.step_name(step) or "latest is damaged" in said, bit
    latest.write_bytes(whole.replace(b"9", b"1", 1))
    with pytest.warns(UserWarning, match="has the checksum of 'step-00000009'"):
        assert step_folder.find(tmp_path).name == "step-00000009"
    for by_hand in ("step-00000003", "step-00000003\n", "step-00000003 \r\n"):
        latest.write_text(by_hand)
        assert step_folder.find(tmp_path).name == "step-00000003"


def test_a_draft_without_room_for_its_lock_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = step_folder.Draft.begin(tmp_path, 1)  # whose owner stays
    draft.discard()
    before = sorted(path.name for path in tmp_path.iterdir())
    real = Path.open

    def full(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == step_folder._LOCK:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    said = refused(lambda: step_folder.Draft.begin(tmp_path, 2))
    assert "No space left on device; those that are there are as they were" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_disk_that_is_full_from_any_moment_on_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keep=1: either the new checkpoint is there, or the old one is."""
    pipe = small(1, OPTIMIZERS["sgd"])
    reader = small(1, OPTIMIZERS["sgd"])
    states = {}
    pipe.save(tmp_path)
    states[0] = pipe.state_dict()
    for moment in range(1, 40):
        pipe.step(rows(moment))
        states[pipe._steps] = pipe.state_dict()
        with monkeypatch.context() as patch:
            count = fill_after(patch, moment)
            with contextlib.suppress(errors.CheckpointError):
                pipe.save(tmp_path, keep=1)
        step = reader.load(tmp_path)
        assert equal(reader.state_dict(), states[step])
        if not count():
            return
    raise AssertionError("more operations than were tried")


def fill_after(patch: pytest.MonkeyPatch, moment: int) -> Any:
    """What is written to a folder fails from the n-th call on; whether any has."""
    left, failed = moment, 0

    def limited(real: Any, always: bool) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left, failed
            if always or any(word in str(options.get("mode", args[1:2])) for word in "wxa"):
                left -= 1
                if left < 0:
                    failed += 1
                    raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **options)

        return call

    for name in ("fsync", "rename", "replace", "mkdir", "link"):
        patch.setattr(os, name, limited(getattr(os, name), True))
    patch.setattr(Path, "open", limited(Path.open, False))
    return lambda: failed

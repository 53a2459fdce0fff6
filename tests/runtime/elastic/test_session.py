"""Sessions in processes that have met: from memory, from other machines' memory, from disk."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pipecompile import elastic, errors
from pipecompile.compiler.driver.auto import Open
from pipecompile.runtime.elastic import division
from pipecompile.runtime.elastic.memory import PREFIX, WHERE, Memory, held_in
from support.gang import Gang
from support.labelled import batch_of, loss_of
from torch import nn


def compiled(session: elastic.Session, stages: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model.traced_once = True  # type: ignore[assignment]
    return session.compile(
        model,
        stages,
        global_microbatches=4,
        example_batch=batch_of(0),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        loss_fn=loss_of,
        seed=7,
        **options,
    )


def attempt(
    stages: Any, until: int, of: int, clean: bool, machines: str = "", **options: Any
) -> tuple[Any, list[float], str]:
    """Train from where the run is, until a step; how it began, its losses, what was said.

    Args:
        of: steps of the whole run; where they are not reached the process is as one that is killed.
        machines: the folder of this rank's machine; "" for one for all.
    """
    place = {WHERE: machines + os.environ.get("RANK", "0")} if machines else {}
    said = io.StringIO()
    with mock.patch.dict(os.environ, place), contextlib.redirect_stderr(said):
        session = elastic.Session(**options)
        pipe = compiled(session, stages)
        losses = []
        for step in session.steps(of):
            if step == until:
                break
            losses.append(float(pipe.step(batch_of(step, pipe.data_shards, pipe.data_shard))))
        if session._keeper is not None:
            session._keeper.wait()
        if clean:
            session.close()
        else:
            pipe.wait_for_save()  # what was begun is on the disk before the process is gone
    return session.resumed, losses, said.getvalue()


@pytest.fixture
def machine(tmp_path: Path) -> str:
    """What the memory of machines begins with."""
    for rank in range(4):
        (tmp_path / f"m{rank}").mkdir()
    return str(tmp_path / "m")


def uninterrupted(stages: Any, steps: int) -> list[float]:
    return attempt(stages, steps, steps, True)[1]


def pieces(folder: str) -> list[Path]:
    return sorted(Path(folder).parent.glob(f"m*/{PREFIX}*"))


def test_another_division_goes_on_from_memory(gang: Callable[[int], Gang], machine: str) -> None:
    """Of two machines, which each have the other's part too; then one has lost all of its own."""
    first = gang(2).run(attempt, 2, 3, 8, False, machine)
    assert first[0][0] == elastic.Resumed(0, "", first[0][0].seconds)
    for path in Path(machine + "1").iterdir():
        shutil.rmtree(path)
    second = gang(2).run(attempt, 2, 6, 8, False, machine)
    resumed, losses, said = second[0]
    assert (resumed.passes, resumed.source) == (3, "memory")
    assert "goes on after 3 passes from memory" in said
    third = gang(2).run(attempt, (1, 1), 8, 8, True, machine)
    assert (third[0][0].passes, third[1][0].source) == (6, "memory")
    whole = first[0][1] + losses + third[0][1]
    assert whole[:6] == uninterrupted(2, 8)[:6], "the same division has the same bits"
    assert whole == pytest.approx(uninterrupted(1, 8), rel=1e-4)
    assert pieces(machine) == [], "nothing is left at the end"


def damaged(machine: str) -> None:
    """Change a byte of every tensor file of all machines."""
    for path in Path(machine).parent.glob(f"m*/{PREFIX}*/*/*/*.safetensors"):
        damage(path)


def damage(path: Path) -> None:
    """Change its last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damaged_memory_is_told_and_the_disk_takes_its_place(
    gang: Callable[[int], Gang], machine: str, tmp_path: Path
) -> None:
    disk = {"directory": str(tmp_path / "run"), "save_every": 2}
    gang(2).run(attempt, 2, 3, 4, False, machine, **disk)
    damaged(machine)
    (resumed, _, said), _ = gang(2).run(attempt, 2, 4, 4, True, machine, **disk)
    assert (resumed.passes, resumed.source) == (2, "disk")
    assert "cannot go on from memory" in said
    assert "damaged" in said


def test_a_damaged_snapshot_is_told_and_the_one_before_takes_its_place(
    gang: Callable[[int], Gang], machine: str, tmp_path: Path
) -> None:
    """That costs one more step, and not all that the disk does not have."""
    disk = {"directory": str(tmp_path / "run"), "save_every": 1000}
    first = gang(2).run(attempt, 2, 3, 4, False, machine, **disk)[0][1]
    held = [(each, run) for run in pieces(machine) for each in held_in(run)]
    newest = max(each.sequence for each, _ in held)
    for each, run in held:
        if each.sequence == newest and each.rank == 0:
            damage(Memory(run).place(each))
    resumed, losses, said = gang(2).run(attempt, 2, 4, 4, True, machine, **disk)[0]
    assert (resumed.passes, resumed.source) == (2, "memory")
    assert "cannot go on from memory" in said
    assert first[:2] + losses == uninterrupted(2, 4)
    assert pieces(machine) == []


def test_a_damaged_checkpoint_is_told_and_the_one_before_takes_its_place(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    """A run that restarts would end by its error again and again. `latest` says where it was: a
    later one is of a run that was left."""
    disk: dict[str, Any] = {"directory": tmp_path, "save_every": 1, "memory": False}
    gang(2).run(attempt, 2, 3, 4, False, **disk)
    damage(tmp_path / "step-00000003" / "part-00001.safetensors")
    (resumed, _, said), _ = gang(2).run(attempt, 2, 3, 4, False, **disk)
    assert (resumed.passes, resumed.source) == (2, "disk")
    assert "cannot go on from disk" in said
    assert "step-00000003/part-00001.safetensors is damaged" in said
    (tmp_path / "latest").write_text("step-00000001\n")
    resumed, _, said = gang(2).run(attempt, 2, 1, 4, False, **disk)[0]
    assert (resumed.passes, "cannot" in said) == (1, False)
    damage(tmp_path / "step-00000001" / "checkpoint.json")
    with pytest.raises(AssertionError, match=r"step-00000001/checkpoint\.json is damaged"):
        gang(2).run(attempt, 2, 4, 4, True, **disk)


def test_another_session_of_the_script_has_other_memory(
    gang: Callable[[int], Gang], machine: str, tmp_path: Path
) -> None:
    """That of a first phase does not go on from the second one's, when the script begins anew."""
    phases = [{"directory": str(tmp_path / name)} for name in ("first", "second")]
    gang(2).run(attempt, 2, 2, 4, True, machine, **phases[0])
    gang(2).run(attempt, 2, 2, 4, False, machine, **phases[1])
    for number, passes in ((0, 0), (1, 2)):
        resumed, _, _ = gang(2).run(attempt, 2, 3, 4, True, machine, **phases[number])[0]
        assert resumed.passes == passes


def test_a_lost_machine_without_a_copy_is_no_snapshot(
    gang: Callable[[int], Gang], machine: str
) -> None:
    gang(2).run(attempt, 2, 2, 4, False, machine)
    for run in pieces(machine):
        for held in held_in(run):
            if held.rank == 1:
                Memory(run).begin(held)
    resumed, losses, _ = gang(2).run(attempt, 2, 4, 4, True, machine)[0]
    assert (resumed.passes, resumed.source) == (0, "")
    assert losses == uninterrupted(2, 4)


def test_one_process_goes_on_from_disk_and_keeps_no_memory(tmp_path: Path) -> None:
    disk = {"directory": tmp_path, "save_every": 2}
    _, first, _ = attempt(2, 3, 5, False, **disk)
    resumed, second, _ = attempt(2, 5, 5, True, **disk)
    assert (resumed.passes, resumed.source) == (2, "disk")
    assert first[:2] + second == uninterrupted(2, 5)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_full_disk_costs_a_checkpoint_and_no_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    _, losses, said = attempt(2, 5, 5, True, directory=tmp_path / "file", save_every=2)
    assert len(losses) == 5
    assert "goes on without a checkpoint" in said


def test_what_is_asked_for_is_checked_before_anything_starts(tmp_path: Path) -> None:
    session = elastic.Session()
    for options, text in (
        ({"dp": 2}, "dp= of session.compile.*n_stages= limits"),
        ({"microbatches": 2}, "microbatches= of session.compile.*global_microbatches="),
        ({"n_stages": (3, 2)}, r"n_stages=\(3, 2\): give a number"),
        ({"n_stages": 0}, "n_stages=0: give a number"),
        ({"global_microbatches": 0}, "global_microbatches=0: give"),
        ({"n_stage": 2}, "did you mean|unexpected"),
    ):
        with pytest.raises((errors.OptionError, TypeError), match=text):
            session.compile(nn.Linear(2, 2), **options)
    with pytest.raises(errors.StateError, match=r"call session.compile\(\) first"):
        session.resume()
    with pytest.raises(errors.OptionError, match="needs a directory"):
        elastic.Session(save_every=3)
    with pytest.raises(errors.OptionError, match="save_every=0"):
        elastic.Session(tmp_path, save_every=0)
    with pytest.raises(errors.OptionError, match="needs example_batch"):
        session.compile(nn.Linear(2, 2), (1, 1))


@pytest.mark.parametrize(
    ("processes", "stages", "microbatches", "used"),
    [
        (4, (2, 2), 8, 4),
        (3, (2, 2), 8, 2),  # one is left over
        (3, (1, 4), 8, 3),  # as three stages
        (3, (1, 2), 8, 2),  # three replicas do not divide 8
        (3, (1, 2), 9, 3),
        (3, (1, 2), None, 3),
        (7, (2, 3), 4, 6),
        (5, (5, 9), 4, 5),
    ],
)
def test_as_many_processes_work_as_can_be_divided(
    processes: int, stages: tuple[int, int], microbatches: int | None, used: int
) -> None:
    open_ = Open(True, False, None, stages=stages, global_microbatches=microbatches)
    assert division.used_of(processes, open_) == used


def test_too_few_processes_are_one_error() -> None:
    open_ = Open(True, False, None, stages=(3, 4))
    with pytest.raises(errors.OptionError, match="there are 2 processes, and n_stages= needs 3"):
        division.used_of(2, open_)


def test_a_run_that_has_begun_waits_for_those_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that has not is told at once."""
    monkeypatch.setenv(WHERE, str(tmp_path))
    for name, value in (("WORLD_SIZE", "1"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(division, "MISSING_S", 0.01)
    for waits in (False, True):
        with pytest.raises(errors.OptionError, match="n_stages= needs 3"):
            compiled(elastic.Session(), (3, 3))
        assert ("waits 0 s for others" in capsys.readouterr().err) == waits
        Memory.of("run")


def test_the_global_batch_is_kept_by_more_microbatches() -> None:
    from pipecompile.compiler.options.options import CompileOptions

    open_ = Open(True, False, None, stages=(1, 4), global_microbatches=8)
    ways = open_.ways(CompileOptions(n_stages=1), 4)
    assert [(w.n_stages, w.dp, w.microbatches) for w in ways] == [(1, 4, 2), (2, 2, 4), (4, 1, 8)]

"""Checkpoints of what training changes: the base is left out, and another one is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.cli.main import main
from pipecompile.errors import OptionError, StateError
from pipecompile.runtime.checkpoint import left_out
from pipecompile.runtime.files.index import read_index
from support import plain
from support.checkpoints import INDEX, edit, optimizer_states, refused
from support.gang import Gang
from support.matrix import quickly
from torch import nn

ADAMW = partial(torch.optim.AdamW, lr=0.05)
OPTIONS = {"optimizer": ADAMW, "microbatches": 2, "loss_normalization": "microbatch"}
WIDTH = 64


class Part(nn.Module):
    """A large frozen matrix beside a small trained one."""

    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.base(x) + self.up(self.down(x))).tanh()


class Adapted(nn.Module):
    """Also a norm whose statistics forward updates, a frozen parameter that it does, a constant."""

    traced_once = True

    def __init__(self, n_parts: int = 3) -> None:
        super().__init__()
        self.parts = nn.Sequential(*(Part() for _ in range(n_parts)))
        self.norm = nn.BatchNorm1d(WIDTH).requires_grad_(False)
        self.calls = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.register_buffer("table", torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            self.calls += 1
        return {"loss": (self.norm(self.parts(x)) * self.table).square().mean()}


LEFT_OUT = {f"parts.{i}.base.{kind}" for i in range(3) for kind in ("weight", "bias")}
LEFT_OUT |= {"norm.weight", "norm.bias", "table"}


def build(seed: int = 0) -> Adapted:
    torch.manual_seed(seed)
    return Adapted()


def rows(step: int, pipe: Any = None) -> torch.Tensor:
    whole = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
    return whole if pipe is None else whole.chunk(pipe.data_shards)[pipe.data_shard]


def compiled(n_stages: int, dp: int = 1, *, seed: int = 0, **options: Any) -> Any:
    share = rows(0).chunk(dp if os.environ.get("WORLD_SIZE", "1") != "1" else 1)[0]
    options = OPTIONS | {"example_batch": share} | options
    return pipecompile.compile(build(seed), n_stages, dp, **options)


def saved(folder: str, n_stages: int, dp: int = 1, **options: Any) -> Any:
    """Two steps, a save without the base and one more step; its loss, and all state after it."""
    pipe = compiled(n_stages, dp, **options)
    for step in range(2):
        pipe.step(rows(step, pipe))
    pipe.save(folder, trainable_only=True)
    return pipe.step(rows(2, pipe)), pipe.state_dict()


def resumed(folder: str, n_stages: int, dp: int = 1, **options: Any) -> Any:
    """The same step of another pipeline, that begins with the base and the checkpoint."""
    pipe = compiled(n_stages, dp, **options)
    assert pipe.load(folder) == 2
    before = pipe.state_dict()
    return pipe.step(rows(2, pipe)), pipe.state_dict(), before


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_it_has_what_training_changes_and_goes_on_exactly(tmp_path: Path) -> None:
    loss, state = saved(str(tmp_path), 2)
    index = read_index(tmp_path / "step-00000002")
    assert {name.removeprefix("model.") for name in index.left_out} == LEFT_OUT
    assert {"norm.running_mean", "calls", "parts.0.up.weight"} <= index.model.keys()
    for n_stages in (1, 3):
        again, found, _ = resumed(str(tmp_path), n_stages)
        assert torch.equal(loss, again)
        assert plain.equal(found, state)


def test_the_base_is_not_written(tmp_path: Path) -> None:
    pipe = compiled(2)
    pipe.step(rows(0))
    whole, part = pipe.save(tmp_path / "whole"), pipe.save(tmp_path / "part", trainable_only=True)
    base = sum(4 * build().get_parameter(name).numel() for name in LEFT_OUT - {"table"}) + 4 * WIDTH
    saved_bytes = bytes_of(whole) - bytes_of(part)
    assert base <= saved_bytes < base + 2000  # their entries in the file's header besides
    assert bytes_of(part) < 0.4 * bytes_of(whole)


@pytest.mark.parametrize("zero", quickly([3], [0, 1, 2, 3]))
def test_processes_that_divide_the_base(
    gang: Callable[[int], Gang], tmp_path: Path, zero: int
) -> None:
    """Its checksums are of whole tensors, so that any division compares them."""
    told = gang(2).run(saved, str(tmp_path), 1, 2, zero=zero)
    one = compiled(1)
    one.load(tmp_path)
    for _, state, before in gang(2).run(resumed, str(tmp_path), 1, 2, zero=zero):
        assert plain.equal(state, told[0][1])
        assert plain.equal(before, one.state_dict())
    for found in gang(2).run(refusal, str(tmp_path), 1, 2, zero=zero):
        assert "of another base: 'table', 'parts.0.base.weight'" in found


def refusal(folder: str, n_stages: int, dp: int, **options: Any) -> str:
    pipe = compiled(n_stages, dp, seed=7, **options)
    return refused(lambda: pipe.load(folder))


@pytest.mark.slow
def test_stages_in_processes(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    loss, state = gang(2).run(saved, str(tmp_path), 2)[0]
    again, found, _ = resumed(str(tmp_path), 1)
    assert torch.equal(loss, again)
    assert plain.equal(found, state)
    for again, found, _ in gang(2).run(resumed, str(tmp_path), 2):
        assert torch.equal(loss, again)
        assert plain.equal(found, state)


def test_another_base_is_one_error_that_names_the_tensor(tmp_path: Path) -> None:
    saved(str(tmp_path), 2)
    pipe = compiled(2)
    other = pipe.state_dict()
    other["parts.1.base.bias"] = other["parts.1.base.bias"] + 1
    pipe.load_state_dict(other)
    said = refused(lambda: pipe.load(tmp_path))
    assert "of another base: 'parts.1.base.bias' has other values here" in said
    assert "verify=False" in said
    assert plain.equal(pipe.state_dict(), other)  # nothing has been changed
    pipe.load(tmp_path, verify=False)
    now, there = pipe.state_dict(), compiled(1)
    there.load(tmp_path)
    assert {n for n, t in there.state_dict().items() if not torch.equal(t, now[n])} == {
        "parts.1.base.bias"
    }


def test_another_shape_of_the_base_is_told(tmp_path: Path) -> None:
    saved(str(tmp_path), 1)

    def reshape(fields: Any) -> None:
        fields["left_out"]["model.table"]["shape"] = [3]

    edit(tmp_path / "step-00000002", reshape)
    assert "'table' is [3] and [64] in the model" in refused(lambda: compiled(1).load(tmp_path))


@pytest.mark.parametrize("name", ["model.parts.0.up.weight", "optimizer.table.exp_avg"])
def test_an_index_that_leaves_out_what_it_has_is_damaged(tmp_path: Path, name: str) -> None:
    saved(str(tmp_path), 1)

    def add(fields: Any) -> None:
        fields["left_out"][name] = fields["left_out"]["model.table"]

    edit(tmp_path / "step-00000002", add)
    assert f"{name!r} is left out" in refused(lambda: compiled(1).load(tmp_path))


def test_checksums_are_taken_once_and_again_after_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    fetch = left_out.fetch

    def noted(state: Any, piece: Any, readers: Any) -> Any:
        read.append(piece.first)
        return fetch(state, piece, readers)

    monkeypatch.setattr(left_out, "fetch", noted)
    pipe = compiled(2)
    for step in range(3):
        pipe.step(rows(step))
        pipe.save(tmp_path, keep=1, trainable_only=True)
    assert sorted(read) == sorted(LEFT_OUT)
    read.clear()
    with torch.no_grad():
        dict(pipe.named_parameters())["parts.2.base.bias"].zero_()
    pipe.save(tmp_path, trainable_only=True)
    assert read == ["parts.2.base.bias"]
    assert "of another base: 'parts.2.base.bias'" in refused(lambda: compiled(1).load(tmp_path))


def test_in_the_background_latest_and_keep(tmp_path: Path) -> None:
    pipe = compiled(2)
    for step in range(3):
        pipe.step(rows(step))
        pipe.save(tmp_path, keep=2, async_save=True, trainable_only=True)
    pipe.wait_for_save()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000002",
        "step-00000003",
    ]
    other = compiled(1)
    assert other.load(tmp_path) == 3
    assert plain.equal(other.state_dict(), pipe.state_dict())
    assert plain.equal(optimizer_states(other), optimizer_states(pipe))


def test_buffers_stay_in_it_where_the_next_run_does_not_update_them(tmp_path: Path) -> None:
    """A save right after a load has what the load had."""
    saved(str(tmp_path / "first"), 1)
    pipe = compiled(2)
    pipe.load(tmp_path / "first")
    pipe.save(tmp_path / "second", trainable_only=True)
    other = compiled(1)
    other.load(tmp_path / "second")
    assert plain.equal(other.state_dict(), pipe.state_dict())


def test_a_base_in_another_dtype_that_says_the_same(tmp_path: Path) -> None:
    """A model in bf16 has its small parameters in fp32 where precision= is given."""
    options = OPTIONS | {"example_batch": rows(0)}
    narrow = pipecompile.compile(build().bfloat16(), 1, precision="bf16", **options)
    narrow.step(rows(0))
    narrow.save(tmp_path, trainable_only=True)
    options["example_batch"] = rows(0).bfloat16()
    other = pipecompile.compile(build().bfloat16(), 1, **options)
    other.load(tmp_path)
    assert read_index(tmp_path / "step-00000001").left_out["model.norm.bias"].spec.dtype == (
        "float32"
    )
    assert other.state_dict()["norm.bias"].dtype == torch.bfloat16


def test_where_nothing_is_frozen_there_is_nothing_to_leave_out(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    batch = torch.ones(4, 4)
    pipe = pipecompile.compile(
        model, 1, loss_fn=lambda out, _: out.square().mean(), example_batch=batch
    )
    with pytest.raises(OptionError, match="training changes every tensor of the model"):
        pipe.save(tmp_path, trainable_only=True)


def test_its_weights_are_not_exported_as_if_they_were_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(str(tmp_path / "run"), 1)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "saved with trainable_only=True and lacks 9 tensors" in said
    assert not (tmp_path / "out").exists()
    pipe = compiled(1)
    pipe.load(tmp_path / "run")
    pipe.save(tmp_path / "whole")
    assert main(["export", str(tmp_path / "whole"), str(tmp_path / "out")]) == 0


def test_a_whole_checkpoint_is_as_it_was(tmp_path: Path) -> None:
    pipe = compiled(1)
    pipe.step(rows(0))
    text = (pipe.save(tmp_path) / INDEX).read_text()
    assert '"version": 2' in text
    assert '"left_out": {}' in text


# -- state dicts in part -----------------------------------------------------------------------


def test_a_state_dict_in_part_is_loaded_as_torch_does() -> None:
    pipe, model = compiled(2), build(3)
    part = model.state_dict()
    for name in [name for name in part if "up" not in name and "down" not in name]:
        del part[name]
    part["other"] = torch.ones(1)
    wanted = build()
    theirs = wanted.load_state_dict(part, strict=False)
    ours = pipe.load_state_dict(part, strict=False)
    assert ours.missing_keys == theirs.missing_keys
    assert ours.unexpected_keys == theirs.unexpected_keys == ["other"]
    assert plain.equal(pipe.state_dict(), dict(wanted.state_dict()))
    with pytest.raises(StateError, match=r"missing .*unexpected \['other'\]"):
        pipe.load_state_dict(part)
    with pytest.raises(StateError, match="has shape"):
        pipe.load_state_dict({"table": torch.ones(3)}, strict=False)
    assert pipe.load_state_dict(dict(model.state_dict())) == ([], [])


def one_rank_alone() -> str:
    pipe = compiled(1, 2, zero=3)
    part = {"table": torch.ones(WIDTH)} if pipe.is_main else {}
    with pytest.raises(StateError) as caught:
        pipe.load_state_dict(part, strict=False)
    return str(caught.value)


@pytest.mark.slow
def test_ranks_load_the_same_parts(gang: Callable[[int], Gang]) -> None:
    for said in gang(2).run(one_rank_alone):
        assert "'table' on some ranks alone" in said

"""Checkpoints that are damaged, foreign or of another way of training are refused by name."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from support import jobs, models
from support.checkpoints import (
    INDEX,
    LR_SCHEDULER,
    OPTIMIZERS,
    PART,
    Position,
    Small,
    edit,
    optimizer_states,
    pipeline,
    refused,
    rows,
    saved,
    small,
    steps,
)
from support.gang import Gang
from support.matrix import quickly
from support.plain import equal
from torch import nn


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint."""
    folder = tmp_path_factory.mktemp("sound")
    pipe = pipeline(2, 1)
    steps(pipe, 0, 1)
    pipe.save(folder)
    return folder


def chunk(fields: Any) -> Any:
    return fields["tensors"]["model.transformer.wte.weight"]["chunks"][0]


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def link_outside(step: Path) -> None:
    (step / PART).rename(step.parent / "outside")
    (step / PART).symlink_to(step.parent / "outside")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (lambda step: cut_off(step / PART), "part-00000.safetensors cannot be read"),
    "cut index": (lambda step: cut_off(step / INDEX), "checkpoint.json is damaged"),
    "no part": (lambda step: (step / PART).unlink(), "is missing: the checkpoint is incomplete"),
    "no index": (lambda step: (step / INDEX).unlink(), "no complete checkpoint"),
    "version": (
        lambda step: edit(step, lambda f: f.update(version=9)),
        "has format version 9 and this pipecompile reads 3",
    ),
    "escape": (
        lambda step: edit(step, lambda f: chunk(f).update(file="../part-00000.safetensors")),
        "which is no file of a checkpoint",
    ),
    "absolute": (
        lambda step: edit(step, lambda f: chunk(f).update(file="/etc/passwd")),
        "which is no file of a checkpoint",
    ),
    "link": (link_outside, "is a link to outside of the checkpoint"),
    "no key": (lambda step: edit(step, lambda f: chunk(f).update(key="x")), "has no tensor 'x'"),
    "shape": (
        lambda step: edit(step, lambda f: chunk(f).update(shape=[1, 2])),
        "the chunks of 'model.transformer.wte.weight' do not cover it",
    ),
    "other file": (
        lambda step: edit(step, lambda f: chunk(f).update(key="model.lm_head.bias")),
        "is damaged",
    ),
    "no states": (
        lambda step: edit(
            step, lambda f: f["tensors"].pop("optimizer.transformer.wpe.weight.step")
        ),
        "it has no tensor 'optimizer.transformer.wpe.weight.step'",
    ),
    "state": (
        lambda step: edit(step, lambda f: f["training"]["random"][0].update(cpu={"$": "pickle"})),
        "the checkpoint's state is damaged",
    ),
    "no optimizer": (
        lambda step: edit(step, lambda f: f["training"].pop("optimizer")),
        "step-00000001 is damaged: KeyError('optimizer')",
    ),
    "not an index": (lambda step: (step / INDEX).write_text("[]"), "checkpoint.json is damaged"),
}


def try_to_load(*directories: str) -> list[str]:
    pipe = pipeline(2, 1)
    return [refused(partial(pipe.load, directory)) for directory in directories]


@pytest.fixture(scope="module")
def loader() -> Any:
    """A pipeline that refuses everything, so that it stays as it is."""
    return pipeline(3, 1)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(sound: Path, tmp_path: Path, loader: Any, damage: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(sound, folder)
    act, message = DAMAGES[damage]
    act(folder / "step-00000001")
    before = loader.state_dict()
    assert message in refused(lambda: loader.load(folder))
    assert equal(loader.state_dict(), before)
    assert not loader.optimizer.state
    assert loader._steps == 0


def test_errors_reach_every_rank(gang: Callable[[int], Gang], sound: Path, tmp_path: Path) -> None:
    """Also that of a file which only one of them reads."""
    folder = tmp_path / "run"
    gang(2).run(saved, str(folder), 2, 1)
    cut_off(folder / "step-00000002" / "part-00001.safetensors")
    nowhere = str(tmp_path / "nowhere")
    for cut, missing in gang(2).run(try_to_load, str(folder), nowhere):
        assert "part-00001.safetensors cannot be read" in cut
        assert "there is no folder" in missing


def test_what_is_no_checkpoint(tmp_path: Path, loader: Any) -> None:
    (tmp_path / "file").touch()
    (tmp_path / ".step-00000003.tmp-00ff").mkdir()
    assert "no complete checkpoint" in refused(lambda: loader.load(tmp_path))
    assert "is a file" in refused(lambda: loader.load(tmp_path / "file"))
    assert "there is no folder" in refused(lambda: loader.load(tmp_path / "nothing"))
    assert "Not a directory" in refused(lambda: loader.save(tmp_path / "file" / "x"))


OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "deeper": (
        {"n_layer": 3},
        [
            "'transformer.h.2.ln_1.weight' is missing, ",
            "and 9 more: build the model that was saved",
        ],
    ),
    "wider": ({"n_embd": 64}, ["'transformer.wte.weight' is [96, 32] and [96, 64] in the model"]),
    "untied": ({"tie_word_embeddings": False}, ["'lm_head.weight' is missing"]),
}


@pytest.mark.parametrize("how", quickly(["deeper"], OTHERS))
def test_another_model(sound: Path, how: str) -> None:
    changes, messages = OTHERS[how]
    model = models.gpt2(**{"n_layer": 2} | changes)
    batch = models.batches("gpt2", 8, 1)[0]
    pipe = pipecompile.compile(model, 1, microbatches=4, example_batch=batch)
    found = refused(lambda: pipe.load(sound))
    assert all(message in found for message in messages), found


class Untied(Small):
    """The same names, and each has its own values."""

    def __init__(self) -> None:
        super().__init__()
        self.third.weight = nn.Parameter(self.first.weight.detach() + 1)


def test_ties_are_those_that_were_saved(tmp_path: Path) -> None:
    def made(model: nn.Module) -> Any:
        return pipecompile.compile(model, 1, microbatches=2, example_batch=torch.ones(8, 6))

    tied, untied = made(Small()), made(Untied())
    tied.save(tmp_path / "tied")
    untied.save(tmp_path / "untied")
    said = refused(lambda: tied.load(tmp_path / "untied"))
    assert "'third.weight' is separate in the checkpoint and tied in the model" in said
    assert "'third.weight' is missing" in refused(lambda: untied.load(tmp_path / "tied"))
    edit(tmp_path / "tied" / "step-00000000", lambda f: f["tied"].update({"second.weight": "x"}))
    said = refused(lambda: tied.load(tmp_path / "tied"))
    assert "'second.weight' is tied in the checkpoint and separate in the model" in said


def one_group_apart(named: Any) -> torch.optim.Optimizer:
    named = [p for _, p in named]
    return torch.optim.AdamW([{"params": named[:2], "lr": 0.5}, {"params": named[2:]}])


def test_another_way_of_training(tmp_path: Path) -> None:
    adamw, sgd = jobs.OPTIMIZERS["adamw"], OPTIMIZERS["sgd"]
    pipe = small(1, adamw, lr_scheduler=LR_SCHEDULER)
    pipe.save(tmp_path / "one")
    grouped = small(1, one_group_apart, lr_scheduler=LR_SCHEDULER)
    grouped.save(tmp_path / "two")

    def load(pipe: Any, folder: str, **options: Any) -> str:
        return refused(lambda: pipe.load(tmp_path / folder, **options))

    assert "has the state of AdamW and the pipeline trains with SGD" in load(small(1, sgd), "one")
    bare = small(1, adamw)
    assert "saved with one of lr_scheduler= and is compiled with none" in load(bare, "one")
    assert "the checkpoint was saved without" in load(pipe, "one", data=Position())
    assert "saved with 1 parameter groups and this stage has 2" in load(grouped, "one")
    shared = "share a parameter group, and were saved with different lr, initial_lr"
    assert shared in load(pipe, "two")


def test_nothing_is_unpickled(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    pipe = pipeline(1, 1)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    monkeypatch.setattr(torch, "load", never)
    assert pipe.load(sound) == 1


FORGED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "amsgrad": (partial(torch.optim.AdamW, lr=0.1), {"amsgrad": True}, "'max_exp_avg_sq'"),
    "centered": (partial(torch.optim.RMSprop, lr=0.1), {"centered": True}, "'grad_avg'"),
    "momentum": (partial(torch.optim.RMSprop, lr=0.1), {"momentum": 0.9}, "'momentum_buffer'"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_setting_without_the_states_that_it_needs_is_refused(tmp_path: Path, name: str) -> None:
    """torch would take it, and fail in the next step."""
    optimizer, settings, missing = FORGED[name]
    pipe = small(2, optimizer)
    pipe.step(rows(0))
    folder = pipe.save(tmp_path)
    edit(folder, lambda f: f["training"]["optimizer"]["groups"][0].update(settings))
    pipe.step(rows(1))
    before = pipe.state_dict(), optimizer_states(pipe), pipe.optimizer.param_groups[0][name]
    said = refused(lambda: pipe.load(tmp_path))
    assert f"of its settings needs the state {missing} of " in said
    after = pipe.state_dict(), optimizer_states(pipe), pipe.optimizer.param_groups[0][name]
    assert equal(after, before)
    pipe.step(rows(2))


def test_settings_whose_states_are_made_later_are_taken(tmp_path: Path) -> None:
    """SGD makes momentum when it is asked for; what a setting leaves behind may be there too."""
    for optimizer, settings in (
        (partial(torch.optim.SGD, lr=0.1), {"momentum": 0.9}),
        (partial(torch.optim.AdamW, lr=0.1, amsgrad=True), {"amsgrad": False}),
    ):
        pipe = small(1, optimizer)
        pipe.step(rows(0))
        folder = pipe.save(tmp_path)
        edit(folder, lambda f, s=settings: f["training"]["optimizer"]["groups"][0].update(s))
        assert pipe.load(tmp_path) == 1
        pipe.step(rows(1))

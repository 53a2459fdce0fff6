"""Whatever is damaged in a checkpoint, or was never right, is refused, with its name."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from pipecompile import errors
from pipecompile.runtime.checkpoint import storage, tree
from pipecompile.runtime.files import checksums, tensor_file
from pipecompile.runtime.files.index import read_index
from support.checkpoints import (
    INDEX,
    LR_SCHEDULER,
    OPTIMIZERS,
    PART,
    edit,
    optimizer_states,
    refused,
    rows,
    small,
)
from support.matrix import quickly
from support.plain import equal

STEP = "step-00000001"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    pipe = small(2, OPTIMIZERS["adam"], lr_scheduler=LR_SCHEDULER)
    pipe.step(rows(0))
    pipe.save(folder)
    return folder


@pytest.fixture(scope="module")
def loader() -> Any:
    """A pipeline that refuses everything, so that it stays as it is."""
    return small(1, OPTIMIZERS["adam"], lr_scheduler=LR_SCHEDULER)


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def tensors_at(part: Path) -> tuple[int, dict[str, range]]:
    """Bytes before the data; tensor -> its bytes."""
    content = part.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    places = {n: each["data_offsets"] for n, each in header.items() if n != "__metadata__"}
    return start, {name: range(start + a, start + b) for name, (a, b) in places.items()}


def bits(step: Path, count: int) -> Iterator[tuple[str, int, str]]:
    """File, bit, and the tensor that it is of: of headers and index as often as of tensors."""
    draw = random.Random(0)
    start, tensors = tensors_at(step / PART)
    for _ in range(count):
        yield INDEX, draw.randrange(8 * (step / INDEX).stat().st_size), ""
        yield PART, draw.randrange(8 * start), ""
        name = draw.choice([name for name, place in tensors.items() if place])
        place = tensors[name]
        yield PART, draw.randrange(8 * place.start, 8 * place.stop), name
    yield PART, 8 * (step / PART).stat().st_size - 1, list(tensors)[-1]


@pytest.mark.parametrize("count", quickly([12], [12, 150]))
def test_any_flipped_bit_is_refused_by_file_and_tensor(copy: Path, loader: Any, count: int) -> None:
    before = loader.state_dict()
    for file, bit, tensor in bits(copy / STEP, count):
        flip(copy / STEP / file, bit)
        said = refused(lambda: loader.load(copy))
        assert file in said, (bit, said)
        assert repr(tensor) in said or not tensor, (bit, said)
        flip(copy / STEP / file, bit)
    assert equal(loader.state_dict(), before)
    assert not loader.optimizer.state
    small(1, OPTIMIZERS["adam"], lr_scheduler=LR_SCHEDULER).load(copy)  # each was put back


def test_what_a_header_says_beside_its_tensors_is_compared_too(copy: Path, loader: Any) -> None:
    at = (copy / STEP / PART).read_bytes().index(b'"pt"') + 1
    flip(copy / STEP / PART, 8 * at)
    assert "part-00000.safetensors is damaged: its header" in refused(lambda: loader.load(copy))


def test_what_is_not_verified_is_read_as_it_is(copy: Path) -> None:
    """And nothing else in a tensor's bytes would have told."""
    _, tensors = tensors_at(copy / STEP / PART)
    flip(copy / STEP / PART, 8 * tensors["model.second.weight"].start)
    pipe = small(1, OPTIMIZERS["adam"], lr_scheduler=LR_SCHEDULER)
    assert "'model.second.weight'" in refused(lambda: pipe.load(copy))
    assert pipe.load(copy, verify=False) == 1


def test_a_flipped_bit_does_not_reach_an_export(copy: Path) -> None:
    _, tensors = tensors_at(copy / STEP / PART)
    flip(copy / STEP / PART, 8 * tensors["model.second.weight"].start)
    index = read_index(copy / STEP)
    with storage.reading(copy / STEP, index) as read:
        read("model.first.weight")
        assert "'model.second.weight'" in refused(lambda: read("model.second.weight"))


def test_a_file_and_its_tensors_have_checksums_of_all_bytes(sound: Path) -> None:
    index, content = read_index(sound / STEP), (sound / STEP / PART).read_bytes()
    start, tensors = tensors_at(sound / STEP / PART)
    assert index.files[PART] == tensor_file.FileFacts(
        len(content), checksums.of_bytes(content[:start])
    )
    for entry in index.tensors.values():
        (chunk,) = entry.chunks
        place = tensors[chunk.key]
        assert chunk.checksum == checksums.of_bytes(content[place.start : place.stop])


def test_checkpoints_without_checksums_load_and_say_so(copy: Path) -> None:
    def older(fields: Any) -> None:
        fields["version"] = 1
        del fields["files"]
        for entry in fields["tensors"].values():
            for chunk in entry["chunks"]:
                del chunk["checksum"]

    edit(copy / STEP, older, sealed=False)
    pipe = small(1, OPTIMIZERS["adam"], lr_scheduler=LR_SCHEDULER)
    with pytest.warns(UserWarning, match="written by a pipecompile without checksums") as said:
        assert pipe.load(copy) == 1
    assert len([each for each in said if "without checksums" in str(each.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without checksums")
        pipe.load(copy, verify=False)


# -- numbers and names -------------------------------------------------------------------------

WEIGHT = "model.second.weight"


def group(**settings: Any) -> Callable[[Any], Any]:
    return lambda f: f["training"]["optimizer"]["groups"][0].update(settings)


def scheduler(**entries: Any) -> Callable[[Any], Any]:
    return lambda f: f["training"]["schedulers"][0].update(entries)


def both_steps(value: Any) -> Callable[[Any], Any]:
    return lambda f: (f.update(step=value), f["training"].update(steps=value))


def halves(fields: Any, second: list[int]) -> None:
    """A tensor of two pieces of half its rows."""
    (whole,) = fields["tensors"][WEIGHT]["chunks"]
    pieces = [{**whole, "shape": [3, 6]}, {**whole, "shape": [3, 6], "key": "x", "offsets": second}]
    fields["tensors"][WEIGHT]["chunks"] = pieces


def empty_tables(fields: Any) -> None:
    fields["training"]["optimizer"].update(tensors={}, values={})


def state(fields: Any, shape: list[int], dtype: str = "float32") -> None:
    name = "optimizer.second.weight.exp_avg"
    chunk = {**fields["tensors"][name]["chunks"][0], "shape": shape, "offsets": [0] * len(shape)}
    fields["tensors"][name] = {"dtype": dtype, "shape": shape, "chunks": [chunk]}


NAN = math.nan
NEVER: dict[str, tuple[Callable[[Any], Any], str]] = {
    "steps -1": (both_steps(-1), "-1 is no count"),
    "steps 1.5": (both_steps(1.5), "1.5 is no count"),
    "steps 2**70": (both_steps(2**70), f"{2**70} is no count"),
    "steps 10**18": (both_steps(10**18), "is no number of steps"),
    "two steps": (lambda f: f.update(step=2), "it is of step 2, and its training of 1"),
    "seed": (lambda f: f["training"].update(seed=2**70), f"its seed is {2**70}"),
    "lr nan": (group(lr=NAN), "a parameter group has lr=nan"),
    "lr -1": (group(lr=-1), "lr=-1, which is no learning rate"),
    "lr text": (group(lr="fast"), "lr='fast', which is no learning rate"),
    "decay": (group(weight_decay=math.inf), "weight_decay=inf"),
    "betas": (group(betas={"$": "tuple", "items": [0.9, NAN]}), "betas=(0.9, nan)"),
    "few betas": (group(betas={"$": "tuple", "items": [0.9]}), "betas=(0.9,), and the optimizer"),
    "amsgrad": (group(amsgrad=0.5), "amsgrad=0.5, and the optimizer True"),
    "range": (group(eps=-1.0), "a parameter group is none of Adam: Invalid epsilon value: -1.0"),
    "none": (group(weight_decay=None), "a parameter group is none of Adam: "),
    "no lr": (lambda f: f["training"]["optimizer"].update(groups=[{}]), "group has no lr"),
    "params": (group(params=[0]), "a parameter group has its own 'params'"),
    "get_lr": (scheduler(get_lr="x"), "has 'get_lr', which is none of it"),
    "optimizer": (scheduler(optimizer="x"), "has 'optimizer', which is none of it"),
    "epoch": (scheduler(last_epoch=1.5), "last_epoch=1.5"),
    "far epoch": (scheduler(last_epoch=2**70), f"last_epoch={2**70}"),
    "base rates": (scheduler(base_lrs=[NAN]), "base_lrs=[nan]"),
    "gamma": (scheduler(gamma="x"), "gamma='x' and not 0.1"),
    "no gamma": (scheduler(gamma=None), "gamma=None and not 0.1"),
    "no epoch": (
        lambda f: f["training"]["schedulers"][0].pop("last_epoch"),
        "the LR scheduler's state has no 'last_epoch'",
    ),
    "two rates": (scheduler(_last_lr=[0.1, 0.1]), "_last_lr=[0.1, 0.1] and not [0.001]"),
    "no table": (empty_tables, "nothing in it is said to have the tensor 'optimizer."),
    "no groups": (
        lambda f: f["training"]["optimizer"].update(groups=[], group_of={}),
        "'optimizer' has no parameter groups",
    ),
    "group of": (
        lambda f: f["training"]["optimizer"]["group_of"].update({"second.weight": 7}),
        "'second.weight' is in group 7 of 'optimizer', which has 1",
    ),
    "unknown": (
        lambda f: f["training"]["optimizer"]["group_of"].update({"nobody": 0}),
        "'optimizer' has a state of 'nobody', which it does not train",
    ),
    "state's shape": (lambda f: state(f, [6, 7]), "is [6, 7], of a parameter that is [6, 6]"),
    "state's size": (lambda f: state(f, [2**40, 2**10]), f"is [{2**40}, 1024], of a parameter"),
    "state's dtype": (lambda f: state(f, [6, 6], "int32"), "is int32, of a parameter in floating"),
    "overlap": (lambda f: halves(f, [2, 0]), f"chunks of {WEIGHT!r} overlap"),
    "outside": (lambda f: halves(f, [4, 0]), f"a chunk of {WEIGHT!r} is larger than the tensor"),
    "one place": (
        lambda f: f["tensors"][WEIGHT]["chunks"][0].update(key="model.first.weight"),
        "are in one place",
    ),
    "missing": (lambda f: f["tensors"][WEIGHT].update(chunks=[]), "do not cover it"),
    "int": (
        lambda f: f["tensors"][WEIGHT].update(dtype="int32"),
        "'second.weight' is int32 and float32 in the model",
    ),
    "stray": (
        lambda f: f["tensors"].update({"other.x": f["tensors"].pop("optimizer.scale.step")}),
        "it has no tensor 'optimizer.scale.step'",
    ),
    "claimed by none": (
        lambda f: f["training"]["optimizer"]["tensors"]["scale"].remove("step"),
        "nothing in it is said to have the tensor 'optimizer.scale.step'",
    ),
    "no checksum": (
        lambda f: f["tensors"][WEIGHT]["chunks"][0].pop("checksum"),
        f"{WEIGHT!r} in {PART} has no checksum",
    ),
    "random": (
        lambda f: f["training"]["random"][0].update(cpu=tree.encode(torch.zeros(3), "")),
        "the random state of rank 0",
    ),
    "no random": (lambda f: f["training"]["random"][0].clear(), "a rank has no random state"),
    "random text": (lambda f: f["training"].update(random="x"), "it has 'x' where a list belongs"),
    "data": (lambda f: f["training"].update(data=None), "it has None where a list belongs"),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_no_training_has_left(copy: Path, loader: Any, name: str) -> None:
    """Though its checksum is right."""
    act, message = NEVER[name]
    edit(copy / STEP, act)
    before, rates = loader.state_dict(), [g["lr"] for g in loader.optimizer.param_groups]
    assert message in refused(lambda: loader.load(copy))
    assert equal(loader.state_dict(), before)
    assert not loader.optimizer.state
    assert [g["lr"] for g in loader.optimizer.param_groups] == rates
    assert callable(loader.lr_scheduler.get_lr)


@pytest.mark.parametrize("count", [-1, 1.5, None])
def test_averages_were_updated_a_number_of_times(tmp_path: Path, count: Any) -> None:
    pipe = small(1, OPTIMIZERS["sgd"])
    average = pipe.averaged()
    average.update()
    pipe.save(tmp_path)
    table = ("training", "optimizers", "averaged", "groups", 0)
    edit(tmp_path / "step-00000000", lambda f: reduce(getitem, table, f).update(averaged=count))
    assert f"averages of weights were updated {count} times" in refused(lambda: pipe.load(tmp_path))
    assert average.n_averaged == 1


@pytest.mark.parametrize("value", [-1.0, 1.5, math.nan, math.inf, 2.0**70])
def test_counters_of_steps_are_counts(tmp_path: Path, loader: Any, value: float) -> None:
    pipe = small(1, OPTIMIZERS["adam"], lr_scheduler=LR_SCHEDULER)
    pipe.step(rows(0))
    next(iter(optimizer_states(pipe).values()))["step"].fill_(value)
    pipe.save(tmp_path)
    assert ".step' is " in refused(lambda: loader.load(tmp_path))
    assert not loader.optimizer.state


def test_a_position_that_is_none(tmp_path: Path) -> None:
    pipe = small(1, OPTIMIZERS["sgd"])
    loader = pipe.loader([torch.ones(6)] * 16, 8)
    pipe.save(tmp_path)
    for change in ({"epoch": -1}, {"batch": 1.5}, {"batch": 3}, {"seed": 2**70}, {"epoch": None}):
        with pytest.raises(errors.StateError):
            loader.load_state_dict(loader.state_dict() | change)
        edit(
            tmp_path / "step-00000000",
            lambda f, c=change: f["training"]["data"][0]["loaders"][0].update(c),
        )
        assert "data= does not take what was saved of it" in refused(lambda: pipe.load(tmp_path))
        assert (loader.epoch, loader.batch) == (0, 0)
        pipe.save(tmp_path)


def test_pipes_are_no_files(copy: Path, loader: Any) -> None:
    """Opening one would wait for ever."""

    (copy / "latest").unlink()
    os.mkfifo(copy / "latest")
    pipe = small(1, OPTIMIZERS["adam"], lr_scheduler=LR_SCHEDULER)
    assert pipe.load(copy) == 1
    pipe.save(copy)
    assert (copy / "latest").read_text().strip() == "step-00000001"
    (copy / STEP / PART).unlink()
    os.mkfifo(copy / STEP / PART)
    assert "part-00000.safetensors is no file" in refused(lambda: loader.load(copy))
    (copy / STEP / INDEX).unlink()
    os.mkfifo(copy / STEP / INDEX)
    assert "no complete checkpoint" in refused(lambda: loader.load(copy))

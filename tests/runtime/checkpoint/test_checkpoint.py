"""Checkpoints: a resumed run is the run that was not interrupted, under any division."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pipecompile import errors
from pipecompile.runtime.checkpoint import storage
from pipecompile.runtime.files.index import Index, read_index
from pipecompile.runtime.transport.turns import Turns
from support import jobs, models
from support.checkpoints import (
    LR_SCHEDULER,
    OPTIMIZERS,
    Position,
    optimizer_states,
    pipeline,
    resumed,
    rows,
    saved,
    small,
    steps,
)
from support.gang import Gang
from support.matrix import quickly
from support.plain import equal
from torch.distributed.checkpoint import load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

# -- resuming ----------------------------------------------------------------------------------


def test_resuming_is_exact_under_any_number_of_stages(tmp_path: Path) -> None:
    uninterrupted = pipeline(2, 1)
    losses = steps(uninterrupted, 0, 4)
    expected = losses[2:], uninterrupted.state_dict()
    assert equal(saved(str(tmp_path), 2, 1), expected)  # to save changes nothing
    for n_stages in (1, 3):
        assert equal(resumed(str(tmp_path), n_stages, 1), expected)


def test_resuming_is_exact_with_replicas(tmp_path: Path) -> None:
    expected = saved(str(tmp_path), 2, 2, 2)
    assert equal(resumed(str(tmp_path), 1, 2, 2), expected)


def test_two_processes_resume_and_others_take_over(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    folder = str(tmp_path)
    expected, other = gang(2).run(saved, folder, 2, 1)
    assert equal(expected, other)
    for answer in gang(2).run(resumed, folder, 2, 1):
        assert equal(answer, expected)
    assert len(list(tmp_path.glob("step-*/part-*"))) == 2
    assert equal(resumed(folder, 1, 1), expected)
    shutil.rmtree(tmp_path)
    assert equal(saved(folder, 1, 1), expected)
    for answer in gang(2).run(resumed, folder, 2, 1):
        assert equal(answer, expected)


@pytest.mark.slow
def test_two_replicas_resume_and_one_takes_over(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    """One replica adds the same 4 microbatches up in one sum, so its next step differs in bits."""
    expected = gang(2).run(saved, str(tmp_path), 1, 2, 2)[0]
    for answer in gang(2).run(resumed, str(tmp_path), 1, 2, 2):
        assert equal(answer, expected)
    two, one = pipeline(1, 2, 2), pipeline(1, 1, 4)
    assert two.load(tmp_path) == one.load(tmp_path) == 2
    assert equal(two.state_dict(), one.state_dict())
    assert equal(optimizer_states(two), optimizer_states(one))
    batch = models.batches("gpt2", 8, 1)[0]
    assert torch.equal(one.evaluate(batch), two.evaluate(batch))


@pytest.mark.parametrize("name", quickly(["groups", "Adafactor"], OPTIMIZERS))
def test_every_optimizer(tmp_path: Path, name: str) -> None:
    pipe, other = small(2, OPTIMIZERS[name]), small(1, OPTIMIZERS[name])
    for step in range(3):
        pipe.step(rows(step))
    for group in pipe.optimizer.param_groups:
        group["lr"] = group["lr"] / 2
    pipe.save(tmp_path)
    other.load(tmp_path)
    assert equal(optimizer_states(pipe), optimizer_states(other))
    for group, theirs in zip(
        pipe.optimizer.param_groups, other.optimizer.param_groups, strict=True
    ):
        assert {k: v for k, v in group.items() if "param" not in k} == {
            k: v for k, v in theirs.items() if "param" not in k
        }
    assert equal([pipe.step(rows(9)) for _ in range(2)], [other.step(rows(9)) for _ in range(2)])
    assert equal(pipe.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=5),
        partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [torch.optim.lr_scheduler.ConstantLR(optimizer), LR_SCHEDULER(optimizer)],
            milestones=[2],
        ),
    ],
)
def test_schedulers(tmp_path: Path, scheduler: Any) -> None:
    adamw = jobs.OPTIMIZERS["adamw"]
    pipe = small(2, adamw, lr_scheduler=scheduler)
    other = small(1, adamw, lr_scheduler=scheduler)
    for step in range(3):
        pipe.step(rows(step))
    pipe.save(tmp_path)
    other.load(tmp_path)
    for step in range(3, 6):
        assert torch.equal(pipe.step(rows(step)), other.step(rows(step)))
        assert pipe.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"]


# -- what else is kept -------------------------------------------------------------------------


def test_data_extras_and_random_streams(tmp_path: Path) -> None:
    at = {3: ("tuple", b"bytes"), "numbers": [1.5, float("inf"), None], "tensor": torch.ones(2)}
    generator = np.random.default_rng(0)
    at |= {"$": {1, 2}, "legacy": np.random.get_state(), "numpy": generator.bit_generator.state}
    pipe, other = pipeline(2, 1), pipeline(1, 1)
    pipe.checkpoint_extras["scaler"] = Position(2.0**16)
    other.checkpoint_extras |= {"scaler": Position(), "another": Position("as it was")}
    data = Position()
    pipe.save(tmp_path, data=Position(at))
    expected = torch.rand(4)
    other.load(tmp_path, data=data)
    assert torch.equal(torch.rand(4), expected)
    assert equal(data.at, at)
    assert isinstance(data.at["legacy"][1], np.ndarray)
    assert other.checkpoint_extras["scaler"].at == 2.0**16
    assert other.checkpoint_extras["another"].at == "as it was"
    with pytest.raises(errors.CheckpointError, match=r"data=\.at\.x is a object, which"):
        pipe.save(tmp_path, data=Position({"x": object()}))
    names = {".owner", "latest", "step-00000000"}
    assert {path.name for path in tmp_path.iterdir()} == names


def positions(directory: str, n_stages: int, dp: int) -> Any:
    """Every replica has its own; loading gives it back."""
    pipe = pipeline(n_stages, dp)
    pipe.save(directory, data=Position(10 + pipe.data_shard))
    data = Position()
    pipe.load(directory, data=data)
    return data.at


def test_positions_are_those_of_the_replicas(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    assert gang(2).run(positions, str(tmp_path), 1, 2) == [10, 11]
    with pytest.raises(errors.CheckpointError, match="at 2 different positions and is now cut"):
        pipeline(2, 1).load(tmp_path, data=Position())


def scale_apart(named: Any, rate: float) -> torch.optim.Optimizer:
    """A group of its own for one parameter, on the stage that has it."""
    named = list(named)
    rest = [p for n, p in named if n != "scale"]
    scale = [p for n, p in named if n == "scale"]
    groups = [{"params": rest, "lr": rate}, {"params": scale, "lr": 5 * rate}]
    return torch.optim.SGD([group for group in groups if group["params"]])


def own(directory: str) -> tuple[list[torch.Tensor], list[float]]:
    """What this rank draws after saving and after loading; the learning rates of its groups, as
    they are loaded and after a step."""
    doubling = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 2.0**step)
    pipe, other = (
        small(2, partial(scale_apart, rate=rate), lr_scheduler=doubling) for rate in (1.0, 9.0)
    )
    torch.manual_seed(100 + int(os.environ["RANK"]))
    pipe.save(directory)
    drawn = [torch.rand(4)]
    torch.manual_seed(0)
    other.load(directory)
    drawn.append(torch.rand(4))
    rates = [group["lr"] for group in other.optimizer.param_groups]
    other.step(rows(0))
    return drawn, [*rates, *(group["lr"] for group in other.optimizer.param_groups)]


def test_ranks_get_back_what_was_their_own(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    """Random streams, and the state of schedulers, one per stage. One process goes on with the
    stream of rank 0."""
    (first, one), (second, two) = gang(2).run(own, str(tmp_path))
    assert torch.equal(*first)
    assert torch.equal(*second)
    assert not torch.equal(first[0], second[0])
    assert (one, two) == ([1.0, 2.0], [1.0, 5.0, 2.0, 10.0])
    judge = small(1, None)
    torch.manual_seed(0)
    judge.load(tmp_path)
    assert torch.equal(torch.rand(4), first[0])


def test_loading_drops_the_gradients_that_wait(tmp_path: Path) -> None:
    """Of calls before it: the next step is that of a pipeline that made none."""
    pipe, other = (small(2, OPTIMIZERS["momentum"]) for _ in range(2))
    pipe.step(rows(0))
    pipe.save(tmp_path)
    pipe.forward_backward(rows(1))
    for each in (pipe, other):
        each.load(tmp_path)
        assert all(param.grad is None for param in each.parameters())
        each.step(rows(2))
    assert equal(pipe.state_dict(), other.state_dict())


def test_weights_without_an_optimizer(tmp_path: Path) -> None:
    """An evaluation reads a training's checkpoint, and a training begins from its weights."""
    pipe = small(2, jobs.OPTIMIZERS["adamw"])
    pipe.step(rows(0))
    pipe.save(tmp_path / "full")
    judge = small(1, None)
    judge.load(tmp_path / "full")
    assert torch.equal(judge.evaluate(rows(1)), pipe.evaluate(rows(1)))
    judge.save(tmp_path / "weights")
    pipe.load(tmp_path / "weights")
    assert not pipe.optimizer.state


# -- DTensors ----------------------------------------------------------------------------------


def sharded(directory: str) -> list[torch.Tensor]:
    """Save shards over 2 ranks, one of them empty; read them back cut the other way."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = {"model.a": torch.arange(15.0).view(5, 3), "model.b": torch.ones(1, 4)}
    folder, turns = Path(directory), Turns(dist.get_rank(), 2)

    def finish(entries: Any, files: Any) -> None:
        Index(0, entries, {}, None, None, {}, files).write(folder)

    parts = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}
    save(parts, storage_writer=storage.Writer(folder, dist.get_rank(), turns, finish))
    index = read_index(folder)
    found = {
        "model.a": distribute_tensor(torch.zeros(5, 3), mesh, [Shard(1)]),
        "model.b": distribute_tensor(torch.zeros(1, 4), mesh, [Replicate()]),
    }
    load(found, storage_reader=storage.Reader(folder, index, turns))
    return [tensor.full_tensor() for tensor in found.values()]


def test_dtensors_are_resharded(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    whole = [torch.arange(15.0).view(5, 3), torch.ones(1, 4)]
    assert equal(gang(2).run(sharded, str(tmp_path)), [whole, whole])
    index = read_index(tmp_path)
    assert len(index.tensors["model.a"].chunks) == 2
    with storage.reading(tmp_path, index) as read:
        assert equal([read("model.a"), read("model.b")], whole)

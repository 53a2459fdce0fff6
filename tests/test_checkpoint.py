"""Checkpoints: a resumed run is the run that was not interrupted, under any division."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pipecompile
import pytest
import torch
import torch.distributed as dist
from pipecompile import errors
from pipecompile.runtime.checkpoint import background, step_folder, storage, tensor_file
from pipecompile.runtime.checkpoint.index import Index, read_index
from support import jobs, models, plain
from support.gang import Gang
from torch import nn
from torch.distributed.checkpoint import load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

INDEX, PART = "checkpoint.json", "part-00000.safetensors"
LR_SCHEDULER = partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1, 3])


def pipeline(n_stages: int, dp: int, microbatches: int = 4, **options: Any) -> Any:
    """GPT-2 with dropout, clipping and a scheduler, compiled for batches of 8 rows."""
    torch.manual_seed(0)
    whole = models.batches("gpt2", 8, 1)[0]
    torch.manual_seed(0)
    options = {
        "optimizer": jobs.OPTIMIZERS["adamw"],
        "lr_scheduler": LR_SCHEDULER,
        "max_grad_norm": 0.1,
        "seed": 5,
        **options,
    }
    world = int(os.environ.get("WORLD_SIZE", "1"))
    example = plain.cut(whole, dp if world > 1 else 1)[0]
    return pipecompile.compile(
        models.gpt2(dropout=0.1, n_layer=2),
        n_stages,
        dp,
        microbatches=microbatches,
        example_batch=example,
        **options,
    )


def steps(pipe: Any, first: int, last: int) -> list[torch.Tensor]:
    """The losses of steps first to last - 1; batch i is the same in every run."""
    batches = models.batches("gpt2", 8, last)[first:]
    shares = [plain.cut(batch, pipe.data_shards)[pipe.data_shard] for batch in batches]
    return [pipe.step(share) for share in shares]


def equal(a: Any, b: Any) -> bool:
    """Values of dicts and lists, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def optimizer_states(pipe: Any) -> dict[str, Any]:
    return {name: dict(pipe.optimizer.state[param]) for name, param in pipe.named_parameters()}


def resumed(directory: str, n_stages: int, dp: int, microbatches: int = 4) -> Any:
    """Load what was saved after 2 steps; the losses of 2 more, and the parameters."""
    pipe = pipeline(n_stages, dp, microbatches)
    assert pipe.load(directory) == 2
    return steps(pipe, 2, 4), pipe.state_dict()


def saved(directory: str, n_stages: int, dp: int, microbatches: int = 4) -> Any:
    """Train 2 steps, save, and 2 more; the losses of those, and the parameters."""
    pipe = pipeline(n_stages, dp, microbatches)
    steps(pipe, 0, 2)
    pipe.save(directory)
    return steps(pipe, 2, 4), pipe.state_dict()


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
    expected, other = gang(2).run("test_checkpoint:saved", folder, 2, 1)
    assert equal(expected, other)
    for answer in gang(2).run("test_checkpoint:resumed", folder, 2, 1):
        assert equal(answer, expected)
    assert len(list(tmp_path.glob("step-*/part-*"))) == 2
    assert equal(resumed(folder, 1, 1), expected)
    shutil.rmtree(tmp_path)
    assert equal(saved(folder, 1, 1), expected)
    for answer in gang(2).run("test_checkpoint:resumed", folder, 2, 1):
        assert equal(answer, expected)


def test_two_replicas_resume_and_one_takes_over(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    """One replica adds the same 4 microbatches up in one sum, so its next step differs in bits."""
    expected = gang(2).run("test_checkpoint:saved", str(tmp_path), 1, 2, 2)[0]
    for answer in gang(2).run("test_checkpoint:resumed", str(tmp_path), 1, 2, 2):
        assert equal(answer, expected)
    two, one = pipeline(1, 2, 2), pipeline(1, 1, 4)
    assert two.load(tmp_path) == one.load(tmp_path) == 2
    assert equal(two.state_dict(), one.state_dict())
    assert equal(optimizer_states(two), optimizer_states(one))
    batch = models.batches("gpt2", 8, 1)[0]
    assert torch.equal(one.evaluate(batch), two.evaluate(batch))


class Small(nn.Module):
    """A tied weight, a buffer that is updated, one that is not kept, a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.third.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.register_buffer("passing", torch.ones(6), persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.norm(self.second(self.first(x)).relu())
        x = self.third(x) * self.scale * self.frozen * self.passing
        return {"loss": x.square().mean()}


def small(n_stages: int, optimizer: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    example = torch.ones(8, 6)
    return pipecompile.compile(
        Small(), n_stages, microbatches=2, optimizer=optimizer, example_batch=example, **options
    )


def rows(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def mixed(named: Any) -> torch.optim.Optimizer:
    """Groups with settings of their own, one of them a tensor; empty on some stages."""
    named = list(named)
    matrices = [p for _, p in named if p.dim() > 1]
    rest = [p for _, p in named if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "name": "rest"}]
    return torch.optim.AdamW(groups, lr=torch.tensor(0.01), betas=(0.8, 0.9))


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, amsgrad=True),
    "groups": mixed,
    "fused": partial(torch.optim.AdamW, fused=True),
} | {
    name: getattr(torch.optim, name)
    for name in ("NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "ASGD", "Rprop", "Adafactor")
}


@pytest.mark.parametrize("name", OPTIMIZERS)
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


class Position:
    """Where a data loader is."""

    def __init__(self, at: Any = 0):
        self.at = at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000000"]


def positions(directory: str, n_stages: int, dp: int) -> Any:
    """Every replica has its own; loading gives it back."""
    pipe = pipeline(n_stages, dp)
    pipe.save(directory, data=Position(10 + pipe.data_shard))
    data = Position()
    pipe.load(directory, data=data)
    return data.at


def test_positions_are_those_of_the_replicas(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    assert gang(2).run("test_checkpoint:positions", str(tmp_path), 1, 2) == [10, 11]
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
    (first, one), (second, two) = gang(2).run("test_checkpoint:own", str(tmp_path))
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


# -- the folder --------------------------------------------------------------------------------


def test_keep_latest_and_single_steps(tmp_path: Path) -> None:
    pipe = small(1, OPTIMIZERS["sgd"])
    folders = []
    for step in range(4):
        pipe.step(rows(step))
        folders.append(pipe.save(tmp_path, keep=2))
    names = ["latest", "step-00000003", "step-00000004"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert (tmp_path / "latest").read_text() == "step-00000004\n"
    assert pipe.load(folders[2]) == 3
    assert pipe.load(tmp_path) == 4
    (tmp_path / "latest").write_text("../elsewhere")
    assert pipe.load(tmp_path) == 4
    (tmp_path / "latest").write_text("step-00000003")
    assert pipe.load(tmp_path) == 3
    pipe.save(tmp_path, keep=1)  # step 3 anew; step 4 came after it and stays
    assert sorted(p.name for p in tmp_path.iterdir()) == names
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
import os, random, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_checkpoint as here

folder, moments = Path({folder!r}), {moments}
pipe = here.small(2, here.OPTIMIZERS["momentum"])
reader = here.small(1, here.OPTIMIZERS["momentum"])
losses = [pipe.step(here.rows(step)) for step in range(1)]
pipe.save(folder)
truth = {{1: pipe.state_dict()}}

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

def after(count):
    def count_down(event, args):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
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
    assert here.equal(reader.state_dict(), truth_of(step)), moment
    for path in folder.glob("step-*"):
        reader.load(path)  # whatever is published is complete
    reader.load(folder)
    reader.save(folder, keep=1)
    litter = [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert not litter, (moment, litter)
    pipe.load(folder)
print("survived", len(moments))
"""


def kill_at(folder: Path, moments: list[float | int]) -> None:
    """Kill a saving process at each moment, and load: seconds, or how many file operations."""
    script = KILLED.format(
        tests=str(Path(__file__).parent), folder=str(folder), moments=repr(moments)
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


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Before every single file operation of saving anew, replacing and removing; and in time."""
    kill_at(tmp_path, [*range(1, 60), 0.01, 0.02, 0.03, 0.05, 0.08])


@pytest.mark.slow
def test_killed_at_many_moments(tmp_path: Path) -> None:
    kill_at(tmp_path, [*range(1, 150), *(0.005 * i for i in range(1, 21))])


# -- in the background -------------------------------------------------------------------------


def test_saving_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is the moment of the call; a second save waits for the first."""
    write = tensor_file.write

    def slowly(*args: Any) -> None:
        time.sleep(0.3)
        write(*args)

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
    expected = gang(2).run("test_checkpoint:in_the_background", str(tmp_path))[0]
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


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(errors.CheckpointError) as caught:
        call()
    return str(caught.value)


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
    for answer in gang(2).run("test_checkpoint:full_disk", str(tmp_path)):
        for message in answer:
            assert "rank 1 cannot write" in message
            assert "No space left on device; the checkpoints before it are as they were" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000000"]


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


# -- bad input ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint."""
    folder = tmp_path_factory.mktemp("sound")
    pipe = pipeline(2, 1)
    steps(pipe, 0, 1)
    pipe.save(folder)
    return folder


def edit(step: Path, change: Callable[[Any], Any]) -> None:
    fields = json.loads((step / INDEX).read_text())
    change(fields)
    (step / INDEX).write_text(json.dumps(fields))


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
        "has format version 9 and this pipecompile reads 1",
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
    gang(2).run("test_checkpoint:saved", str(folder), 2, 1)
    cut_off(folder / "step-00000002" / "part-00001.safetensors")
    nowhere = str(tmp_path / "nowhere")
    for cut, missing in gang(2).run("test_checkpoint:try_to_load", str(folder), nowhere):
        assert "part-00001.safetensors cannot be read" in cut
        assert "there is no folder" in missing


def test_what_is_no_checkpoint(tmp_path: Path, loader: Any) -> None:
    (tmp_path / "file").touch()
    (tmp_path / ".step-00000003.tmp-00ff").mkdir()
    assert "no complete checkpoint" in refused(lambda: loader.load(tmp_path))
    assert "is a file" in refused(lambda: loader.load(tmp_path / "file"))
    assert "there is no folder" in refused(lambda: loader.load(tmp_path / "nothing"))
    assert "Not a directory" in refused(lambda: loader.save(tmp_path / "file" / "x"))


def test_another_model(sound: Path) -> None:
    batch = models.batches("gpt2", 8, 1)[0]

    def load(**changes: Any) -> str:
        model = models.gpt2(**{"n_layer": 2} | changes)
        pipe = pipecompile.compile(model, 1, microbatches=4, example_batch=batch)
        return refused(lambda: pipe.load(sound))

    deeper = load(n_layer=3)
    assert "'transformer.h.2.ln_1.weight' is missing, " in deeper
    assert "and 9 more: build the model that was saved" in deeper
    wider = load(n_embd=64)
    assert "'transformer.wte.weight' is [96, 32] and [96, 64] in the model" in wider
    assert "'lm_head.weight' is missing" in load(tie_word_embeddings=False)


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


# -- DTensors ----------------------------------------------------------------------------------


def sharded(directory: str) -> list[torch.Tensor]:
    """Save shards over 2 ranks, one of them empty; read them back cut the other way."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = {"model.a": torch.arange(15.0).view(5, 3), "model.b": torch.ones(1, 4)}
    folder = Path(directory)

    def finish(entries: Any) -> None:
        Index(0, entries, {}, None, None, {}).write(folder)

    parts = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}
    save(parts, storage_writer=storage.Writer(folder, dist.get_rank(), finish))
    index = read_index(folder)
    found = {
        "model.a": distribute_tensor(torch.zeros(5, 3), mesh, [Shard(1)]),
        "model.b": distribute_tensor(torch.zeros(1, 4), mesh, [Replicate()]),
    }
    load(found, storage_reader=storage.Reader(folder, index))
    return [tensor.full_tensor() for tensor in found.values()]


def test_dtensors_are_resharded(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    whole = [torch.arange(15.0).view(5, 3), torch.ones(1, 4)]
    assert equal(gang(2).run("test_checkpoint:sharded", str(tmp_path)), [whole, whole])
    index = read_index(tmp_path)
    assert len(index.tensors["model.a"].chunks) == 2
    with storage.reading(tmp_path, index) as read:
        assert equal([read("model.a"), read("model.b")], whole)

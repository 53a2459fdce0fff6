"""What goes wrong between processes: every rank ends within seconds, the first cause on top."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from pipecompile import errors
from pipecompile.runtime.transport.neighbours import SWITCH
from support import jobs, models, options
from support.gang import Gang, free_port
from support.scripts import SMALL

LIMIT_S = 90  # start of the processes included; a hang would take gloo's half hour


def rank() -> int:
    return int(os.environ["RANK"])


def refused(make: Callable[[], Any]) -> str:
    """What a call raises, as text; gangs answer with it."""
    try:
        make()
    except errors.PipecompileError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def other_model() -> str:
    layers = 2 if rank() == 0 else 1
    model = models.gpt2(n_layer=layers)
    return refused(lambda: pipecompile.compile(model, 2, example_batch=models.tokens(4)))


def other_weights() -> str:
    torch.manual_seed(rank())
    model = models.gpt2()
    torch.manual_seed(0)
    batch = models.tokens(4)
    return refused(lambda: pipecompile.compile(model, 2, example_batch=batch))


def other_microbatches() -> str:
    return refused(lambda: jobs.pipeline("gpt2", 2, 1, 1 + rank()))


def other_shape() -> str:
    pipe = jobs.pipeline("gpt2", 2, 1, 2)
    pipe.step(models.batches("gpt2", 4, 1)[0])
    torch.manual_seed(0)
    return refused(lambda: pipe.step(models.tokens(4, length=12 + rank())))


def other_call() -> str:
    pipe = jobs.pipeline("gpt2", 2, 1, 2)
    batch = models.batches("gpt2", 4, 1)[0]
    return refused(lambda: pipe.evaluate(batch) if rank() else pipe.step(batch))


def other_data() -> str:
    pipe = jobs.pipeline("gpt2", 2, 1, 2)
    torch.manual_seed(rank())
    return refused(lambda: pipe.step(models.tokens(4)))


def a_skipped_batch() -> str:
    """Inputs of a batch with the labels of the next, as its rank has skipped one."""
    pipe = jobs.pipeline("gpt2", 2, 1, 2)
    data = models.batches("gpt2", 4, 3)
    pipe.step(data[0])
    return refused(lambda: pipe.step(data[1 + rank()]))


def other_options() -> str:
    model = models.build("gpt2")
    how = ("per_step", "per_microbatch")[rank()]
    batch = models.batches("gpt2", 4, 1)[0]
    return refused(lambda: pipecompile.compile(model, 2, tied_grads=how, example_batch=batch))


def every_other_option(folder: Path) -> dict[str, str]:
    """Option -> what it is to differ in it; but for dp, where one of them is told to be alone, and
    for cudagraphs, which no CPU records: "auto" is False there."""
    model = torch.nn.Linear(8, 8)
    return {
        name: refused(partial(pipecompile.compile, model, **pair[rank()]))
        for name, pair in options.differing(folder).items()
        if name not in ("dp", "cudagraphs")
    }


def wrong_world() -> str:
    return refused(lambda: pipecompile.compile(models.gpt2(), 3, 2))


def goes_on_after_an_error() -> float:
    """A batch that no rank can use is an error on all ranks, and the next step works."""
    pipe = jobs.pipeline("gpt2", 2, 1, 2)
    nothing = {key: value[:0] for key, value in models.batches("gpt2", 4, 1)[0].items()}
    assert "BatchError" in refused(lambda: pipe.step(nothing))
    time.sleep(1.5)
    return float(pipe.step(models.batches("gpt2", 4, 1)[0]))


def only_here(call: str, folder: Path, odd: int = 0, shared: str = "") -> str:
    """One rank makes a call that the other one does not, and both go on to the next step."""
    with mock.patch.dict(os.environ, {SWITCH: shared}):
        pipe = jobs.pipeline("gpt2", 2, 1, 2)
    batch = models.batches("gpt2", 4, 1)[0]
    pipe.step(batch)
    calls: dict[str, Callable[[], Any]] = {
        "state_dict": pipe.state_dict,
        "save": lambda: pipe.save(folder),
        "load": lambda: pipe.load(folder),
        "evaluate": lambda: pipe.evaluate(batch),
        "forward": lambda: pipe.forward(batch),
        "clip_grad_norm_": lambda: pipe.clip_grad_norm_(1.0),
        "wait_for_save": pipe.wait_for_save,
    }
    return refused(lambda: calls[call]() if rank() == odd else pipe.step(batch))


@pytest.mark.parametrize(
    ("call", "odd", "shared"),
    [
        ("state_dict", 0, ""),
        ("save", 1, "off"),
        *(
            pytest.param(call, odd, shared, marks=pytest.mark.slow)
            for call in ("state_dict", "save", "load", "evaluate", "forward", "clip_grad_norm_")
            for odd in (0, 1)
            for shared in ("", "off")
        ),
        pytest.param("wait_for_save", 0, "", marks=pytest.mark.slow),
    ],
)
def test_a_call_that_one_rank_makes(
    gang: Callable[[int], Gang], tmp_path: Path, call: str, odd: int, shared: str
) -> None:
    names = ["step", "step"]
    names[odd] = call
    one, other = (f"{n}({1 if n == 'clip_grad_norm_' else ''}) (call 2)" for n in names)
    told = f"rank 0 is in {one} and rank 1 in {other}: every rank"
    for answer in gang(2).run(only_here, call, tmp_path, odd, shared):
        assert told in answer


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (other_model, "RankMismatchError: rank 1 captured another graph than rank 0"),
        (other_weights, "differs between rank 0 and rank 1: call torch.manual_seed"),
        (other_microbatches, "rank 1 has microbatches=2, rank 0 microbatches=1"),
        (other_shape, "input_ids: int64[1, 12]"),
        (
            other_call,
            "rank 0 is in step() (call 1) and rank 1 in evaluate() (call 1): every",
        ),
        (other_data, "given different data: shard it by pipe.data_shards"),
        (a_skipped_batch, "let every rank read, or skip, the same batches"),
        (other_options, "rank 1 has tied_grads='per_microbatch', rank 0 tied_grads='per_step'"),
        (wrong_world, "n_stages=3 × dp=2 needs 6 processes, and there are 2"),
    ],
)
def test_ranks_that_disagree(
    gang: Callable[[int], Gang], job: Callable[[], str], message: str
) -> None:
    for answer in gang(2).run(job):
        assert message in answer


def test_ranks_that_differ_in_any_option(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    options.differing(tmp_path)  # makes the files
    for answer in gang(2).run(every_other_option, tmp_path):
        for name, message in answer.items():
            assert message.startswith(f"RankMismatchError: rank 1 has {name}=")


def test_an_error_that_was_caught_is_over(gang: Callable[[int], Gang]) -> None:
    first, second = gang(2).run(goes_on_after_an_error)
    assert first == second


def test_shards_follow_the_replicas(gang: Callable[[int], Gang]) -> None:
    assert gang(4).run(shards) == [(2, 0), (2, 0), (2, 1), (2, 1)]
    one = pipecompile.compile(models.gpt2(), 2, 2)
    assert (one.data_shards, one.data_shard) == (1, 0)


def shards() -> tuple[int, int]:
    pipe = pipecompile.compile(models.gpt2(), 2, 2)
    return pipe.data_shards, pipe.data_shard


SCRIPT = (
    """
import os, sys, time, torch
import pipecompile
rank, how = int(os.environ["RANK"]), sys.argv[1]
"""
    + SMALL
    + """
if how == "label":
    batch["label"] += 3
if how in ("inside", "caught") and rank == 1:
    executor = next(iter(pipe._session.loaded.values())).executors[1]
    def boom(*_):
        raise ArithmeticError("the second stage is out of numbers")
    executor.stages[1].code.forward.module.forward = boom
if how == "between" and rank == 1:
    raise ArithmeticError("the data loader is out of data")
if how == "caught" and rank == 1:  # and stays alive, its connections open
    try:
        pipe.step(batch)
    except ArithmeticError:
        time.sleep(600)
if how == "evaluating":
    def batches():
        yield batch
        if rank == 1:
            raise ArithmeticError("the second loader is out of data")
        yield batch
    pipe.evaluate(batches())
if how == "ends" and rank == 1:
    sys.exit(0)
if how == "killed" and rank == 1:
    os.kill(os.getpid(), 9)
pipe.step(batch)
print("finished", rank)
"""
)


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        pytest.param(
            "inside",
            "ArithmeticError: the second stage is out of numbers",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "evaluating",
            "ArithmeticError: the second loader is out of data",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "between",
            "ArithmeticError: the data loader is out of data",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "caught",
            "ArithmeticError: the second stage is out of numbers",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "label",
            "BatchError: rank 1, 1F0, the model or loss_fn (aten.nll_loss_forward.default): a tok",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_that_fails_brings_the_others_down(tmp_path: Path, how: str, cause: str) -> None:
    survivor, status = run(tmp_path, how)
    assert "rank 1 (stage 1, replica 0) failed first" in survivor
    assert cause in survivor
    assert status != 0


def run(folder: Path, how: str, environment: dict[str, str] | None = None) -> tuple[str, int]:
    """What rank 0 says, which fails in time, and with which status rank 1 ends, if it does."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    port = str(free_port())
    start = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), how],
            env=os.environ
            | {
                "RANK": str(r),
                "LOCAL_RANK": str(r),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            }
            | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    try:
        _, survivor = processes[0].communicate(timeout=LIMIT_S)
        assert processes[0].returncode != 0
        assert time.monotonic() - start < LIMIT_S
        status = 1 if how == "caught" else processes[1].wait(timeout=LIMIT_S)
    finally:
        for process in processes:
            process.kill()
    return survivor, status


@pytest.mark.parametrize(
    ("how", "shared"),
    [
        pytest.param("ends", "", marks=pytest.mark.slow),
        pytest.param("killed", "", marks=pytest.mark.slow),
        pytest.param("ends", "off", marks=pytest.mark.slow),
        pytest.param("killed", "off", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_has_ended_is_told(tmp_path: Path, how: str, shared: str) -> None:
    survivor, _ = run(tmp_path, how, {SWITCH: shared})
    told = {
        "ends": "has ended its script after step() (call 1), and rank 0 is in step() (call 2): ",
        "killed": "died outside of the pipeline's calls, after step() (call 1): its process was",
    }
    assert f"PeerFailedError: rank 1 (stage 1, replica 0) {told[how]}" in survivor


def a_step_that_one_rank_takes(folder: Path) -> list[str]:
    """Rank 1's optimizer fails, after rank 0 has stepped."""
    pipe = jobs.pipeline("gpt2", 2, 1, 2)
    batch = models.batches("gpt2", 4, 1)[0]
    pipe.step(batch)
    if rank() == 1:
        error = ArithmeticError("no numbers")
        patched = mock.patch.object(pipe.optimizer, "step", side_effect=error)
        with patched, pytest.raises(ArithmeticError, match="no numbers"):
            pipe.step(batch)
    else:
        pipe.step(batch)
    return [refused(lambda: pipe.save(folder)), refused(pipe.state_dict)]


def test_a_torn_step_is_not_saved(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    for answers in gang(2).run(a_step_that_one_rank_takes, tmp_path):
        for answer in answers:
            assert answer.startswith("PeerFailedError: a run has failed before: ranks may have")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_parameter_free_rank_still_has_an_optimizer(gang: Callable[[int], Gang]) -> None:
    assert gang(2).run(frozen_first_stage) == [0, 1]


def frozen_first_stage() -> int:
    """Whether this rank's optimizer has any state: rank 0 has nothing to train."""
    model = models.build("llama")
    model.model.requires_grad_(False)
    pipe = pipecompile.compile(
        model,
        2,
        microbatches=2,
        optimizer=jobs.OPTIMIZERS["adamw"],
        max_grad_norm=1.0,
        example_batch=models.batches("llama", 4, 1)[0],
    )
    schedule = torch.optim.lr_scheduler.ConstantLR(pipe.optimizer)
    for batch in models.batches("llama", 4, 2):
        pipe.step(batch)
        schedule.step()
    return int(bool(pipe.optimizer.state))

"""Training that goes on under another division: the next losses are those of the run that was
never interrupted.

2 stages × 2 replicas at level 1 train 2 steps in 4 processes and save; others go on from there.
A replica has one microbatch, so that 2 replicas add up the gradients that one replica adds up over
2 microbatches, in the same order: one replica has the same bits, in any number of stages. They
clip nothing: level 1 has its own norm (docs/zero.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from support import jobs, models, plain
from support.gang import Gang

BATCHES = models.batches("gpt2", 8, 7)
SAVED, STEPS = 2, 5  # steps before the checkpoint, and after it
FIRST = (2, 2, 1)  # n_stages, dp, zero
Losses = list[torch.Tensor]
State = dict[str, torch.Tensor]


def pipeline(
    n_stages: int, dp: int, zero: int, precision: str | None = None, dropout: float = 0.0
) -> Any:
    """GPT-2, tied over its stages, compiled for the global batch of 8 rows."""
    torch.manual_seed(0)
    pipe = pipecompile.compile(
        models.gpt2(dropout),
        n_stages,
        dp,
        microbatches=max(1, 2 // dp),
        optimizer=jobs.OPTIMIZERS["adamw"],
        max_grad_norm=0.1 if dropout else None,
        seed=5,
        zero=zero,
        precision=precision,
    )
    pipe.compile_for(plain.cut(BATCHES[0], pipe.data_shards)[pipe.data_shard])
    return pipe


def steps(pipe: Any, first: int, last: int) -> Losses:
    shares = [plain.cut(b, pipe.data_shards)[pipe.data_shard] for b in BATCHES[first:last]]
    return [pipe.step(share) for share in shares]


def saved(folder: str, *division: Any, **options: Any) -> tuple[int, Losses, State]:
    """What `resumed` answers, of the run that saves and goes on."""
    pipe = pipeline(*division, **options)
    steps(pipe, 0, SAVED)
    pipe.save(folder)
    return os.getpid(), steps(pipe, SAVED, SAVED + STEPS), pipe.state_dict()


def resumed(folder: str, *division: Any, **options: Any) -> tuple[int, Losses, State]:
    """The process, the losses of the next 5 steps, and the parameters after them."""
    pipe = pipeline(*division, **options)
    assert pipe.load(folder) == SAVED
    return os.getpid(), steps(pipe, SAVED, SAVED + STEPS), pipe.state_dict()


@cache
def uninterrupted(precision: torch.dtype | None = None) -> tuple[Losses, State]:
    """Plain PyTorch, never saved: the first steps in fp32, the others under autocast."""
    model = models.build("gpt2")
    optimizer = jobs.OPTIMIZERS["adamw"](model.parameters())

    def go_on(batches: Any, dtype: torch.dtype | None) -> plain.Trained:
        return plain.train(model, batches, lambda _: optimizer, 2, 1, float("inf"), dtype)

    go_on(BATCHES[:SAVED], None)
    run = go_on(BATCHES[SAVED:], precision)
    return run.losses, run.params


def assert_equal(found: tuple[int, Losses, State], losses: Losses, params: State) -> None:
    assert len(found[1]) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(found[1], losses, strict=True))
    assert not [name for name in params if not torch.equal(found[2][name], params[name])]


@pytest.mark.slow
def test_one_replica_goes_on_with_the_bits_of_two(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    """4 stages in 4 processes without ZeRO, and one process."""
    folder = str(tmp_path)
    for found in gang(4).run(saved, folder, *FIRST):
        assert_equal(found, *uninterrupted())
    found = gang(4).run(resumed, folder, 4, 1, 0)
    assert len({process for process, *_ in found} | {os.getpid()}) == 5
    for each in (*found, resumed(folder, 1, 1, 0)):
        assert_equal(each, *uninterrupted())


@pytest.mark.slow
def test_bf16_goes_on_as_autocast(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    """In another precision the losses are others; they are those of plain PyTorch that changes to
    autocast at the same step, bit for bit, and near those of fp32."""
    gang(4).run(saved, str(tmp_path), *FIRST)
    for found in gang(2).run(resumed, str(tmp_path), 2, 1, 0, "bf16"):
        assert_equal(found, *uninterrupted(torch.bfloat16))
        for a, b in zip(found[1], uninterrupted()[0], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_four_replicas_go_on_with_rounding(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    """Of 2 rows each, at level 3: the first loss is of the same parameters, and all of them are
    sums in another order."""
    gang(4).run(saved, str(tmp_path), *FIRST)
    alone = resumed(str(tmp_path), 1, 4, 3)
    for found in gang(4).run(resumed, str(tmp_path), 1, 4, 3):
        assert_equal(found, *alone[1:])
        for a, b in zip(found[1], uninterrupted()[0], strict=True):
            assert torch.allclose(a, b, rtol=3e-7, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("division", [(1, 2, 1), (3, 2, 1), FIRST], ids=str)
def test_dropout_goes_on_with_the_same_masks(
    gang: Callable[[int], Gang], tmp_path: Path, division: Any
) -> None:
    """And clipped: with as many replicas of as many microbatches, in any number of stages."""
    pipe = pipeline(*FIRST, dropout=0.1)
    losses = steps(pipe, 0, SAVED + STEPS)[SAVED:]
    gang(4).run(saved, str(tmp_path), *FIRST, dropout=0.1)
    processes = division[0] * division[1]
    for found in gang(processes).run(resumed, str(tmp_path), *division, dropout=0.1):
        assert_equal(found, losses, pipe.state_dict())

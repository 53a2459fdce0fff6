"""``scale=``: several calls before a step are a plain loop of ``(loss * scale).backward()``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pipecompile.errors import OptionError
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn

MAX_NORM = 0.1


def calls(count: int, rows: int, name: str = "gpt2") -> list[models.Batch]:
    return models.batches(name, rows, count)


def uneven(batches: list[models.Batch]) -> list[models.Batch]:
    """Other numbers of labels in each row, so that microbatches count otherwise."""
    for number, batch in enumerate(batches):
        batch["labels"] = batch["labels"].clone()
        for row, labels in enumerate(batch["labels"]):
            labels[: (3 * row + number) % 10] = -100
    return batches


def train(
    n_stages: int,
    dp: int,
    microbatches: int,
    k: int,
    steps: int = 2,
    odd: bool = False,
    **options: Any,
) -> plain.Trained:
    """Each step of ``k`` calls, as this process's rank or as all."""
    pipe = jobs.pipeline("gpt2", n_stages, dp, microbatches, **options)
    batches = calls(steps * k, 2 * dp * microbatches)
    batches = iter(uneven(batches) if odd else batches)
    run = plain.Trained([], [], [], {})
    for _ in range(steps):
        for _ in range(k):
            share = plain.cut(next(batches), pipe.data_shards)[pipe.data_shard]
            run.losses.append(pipe.forward_backward(share, scale=1 / k).clone())
        plain.end_step(pipe, run, MAX_NORM)
    run.params = pipe.state_dict()
    return run


def kept(piece: models.Batch) -> int:
    return int((piece["labels"][:, 1:] != -100).sum())


def train_plainly(
    microbatches: int, k: int, steps: int = 2, odd: bool = False, fp16: bool = False
) -> plain.Trained:
    """The oracle: one process, one replica."""
    model = models.build("gpt2")
    optimizer = jobs.OPTIMIZERS["adamw"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    batches = calls(steps * k, 2 * microbatches)
    batches = iter(uneven(batches) if odd else batches)
    run = plain.Trained([], [], [], {})
    for _ in range(steps):
        for _ in range(k):
            batch = next(batches)
            pieces = plain.cut(batch, microbatches)
            total, found = sum(map(kept, pieces)), []
            for piece in pieces:
                with plain.autocast(torch.float16 if fp16 else None):
                    loss = model(**piece).loss
                part = loss * (kept(piece) / total) if odd else loss / microbatches
                scaler.scale(part / k).backward()
                found.append(part.detach().double() if odd else loss.detach())
            whole = torch.stack(found)
            run.losses.append(whole.sum().float() if odd else whole.mean())
        scaler.unscale_(optimizer)
        run.grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        run.norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
    run.params = dict(copy.deepcopy(model.state_dict()))
    return run


@pytest.mark.parametrize(
    ("n_stages", "microbatches", "k", "schedule"),
    quickly(
        [(2, 3, 3, "1f1b")],
        [
            (2, 3, 3, "1f1b"),
            (1, 2, 4, "1f1b"),
            (3, 3, 5, "1f1b"),
            (2, 4, 3, "zb_h1"),
            (2, 4, 6, "interleaved"),
            (2, 3, 7, "zb_v"),
        ],
    ),
)
def test_the_bits_of_a_plain_loop(n_stages: int, microbatches: int, k: int, schedule: str) -> None:
    """Whatever ``k`` and the number of microbatches: neither has to be a power of two."""
    found = train(n_stages, 1, microbatches, k, schedule=schedule)
    plain.assert_equal(found, train_plainly(microbatches, k))


@pytest.mark.parametrize("k", quickly([3], [3, 4]))
def test_labels_are_counted_over_each_whole_call(k: int) -> None:
    found, expected = train(2, 1, 3, k, odd=True), train_plainly(3, k, odd=True)
    for a, b in zip(found.losses, expected.losses, strict=True):
        torch.testing.assert_close(a, b)
    found.losses = expected.losses
    plain.assert_equal(found, expected)


@pytest.mark.slow
def test_loss_scaling_is_beside_it() -> None:
    """The scale of fp16 is a power of two: it rounds nothing."""
    found = train(2, 1, 3, 3, precision="fp16")
    expected = train_plainly(3, 3, fp16=True)
    for a, b in zip(found.losses, expected.losses, strict=True):
        torch.testing.assert_close(a, b)
    found.losses = expected.losses
    plain.assert_equal(found, expected)


@pytest.mark.parametrize(
    ("zero", "precision"),
    quickly([(2, None)], [(1, None), (2, None), (3, None), (0, None), (1, "fp16"), (3, "fp16")]),
)
def test_in_processes_whatever_replicas_divide(
    gang: Callable[[int], Gang], zero: int, precision: str | None
) -> None:
    """Two replicas, of which each takes half of the rows: to rounding the loop over all."""
    options = {"precision": precision}
    runs = gang(2).run(train, 1, 2, 2, 3, zero=zero, **options)
    whole = train(1, 1, 4, 3, **options)
    for run in runs:
        for a, b in zip(run.losses, whole.losses, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
        for a, b in zip(run.norms, whole.norms, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4 if precision is None else 1e-2, atol=0)


def test_stages_in_processes_have_the_bits_too(gang: Callable[[int], Gang]) -> None:
    expected = train_plainly(3, 3)
    for run in gang(2).run(train, 2, 1, 3, 3):
        plain.assert_equal(run, expected, whole=False)


def differing() -> str:
    pipe = jobs.pipeline("gpt2", 2, 1, 2)
    try:
        pipe.forward_backward(calls(1, 4)[0], scale=0.5 if pipe.is_main else 0.25)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_ranks_with_other_scales_are_told(gang: Callable[[int], Gang]) -> None:
    for answer in gang(2).run(differing):
        assert "rank 0 is in forward_backward(scale=0.5)" in answer
        assert "rank 1 in forward_backward(scale=0.25)" in answer


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), True, "1", None, torch.ones(2)])
def test_what_is_no_number(scale: Any) -> None:
    pipe = jobs.pipeline("gpt2", 2, 1, 2)
    with pytest.raises(OptionError, match="scale="):
        pipe.forward_backward(calls(1, 4)[0], scale=scale)


def test_nothing_and_less() -> None:
    """Zero counts nothing, and a negative scale turns the gradient round."""
    batch = calls(1, 4)[0]
    pipe = jobs.pipeline("gpt2", 2, 1, 2)
    pipe.forward_backward(batch)
    once = {n: p.grad.clone() for n, p in pipe.named_parameters()}
    pipe.forward_backward(batch, scale=0.0)
    assert all(torch.equal(p.grad, once[n]) for n, p in pipe.named_parameters())
    pipe.zero_grad()
    pipe.forward_backward(batch, scale=-2.0)
    assert all(torch.equal(p.grad, -2.0 * once[n]) for n, p in pipe.named_parameters())

"""Clipping by norms of every kind, and by value, is torch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from pipecompile.errors import GradientError, OptionError
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn

INF = math.inf


def train(
    n_stages: int, dp: int, kind: float | None, limit: float, steps: int = 3, **options: Any
) -> plain.Trained:
    """Clipping by a norm; by value where there is none."""
    pipe = jobs.pipeline("gpt2", n_stages, dp, 2, **options)
    run = plain.Trained([], [], [], {})
    for batch in models.batches("gpt2", 4 * dp, steps):
        run.losses.append(
            pipe.forward_backward(plain.cut(batch, pipe.data_shards)[pipe.data_shard])
        )
        if kind is None:
            pipe.clip_grad_value_(limit)
        else:
            run.norms.append(pipe.clip_grad_norm_(limit, norm_type=kind))
        pipe.optimizer.step()
        pipe.zero_grad()
    run.params = pipe.state_dict()
    return run


def train_plainly(dp: int, kind: float | None, limit: float, steps: int = 3) -> plain.Trained:
    model = models.build("gpt2")
    optimizer = jobs.OPTIMIZERS["adamw"](model.parameters())
    run = plain.Trained([], [], [], {})
    for batch in models.batches("gpt2", 4 * dp, steps):
        run.losses.append(plain.accumulate(model, batch, dp, 2))
        if kind is None:
            nn.utils.clip_grad_value_(model.parameters(), limit)
        else:
            run.norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit, norm_type=kind))
        optimizer.step()
    run.params = model.state_dict()
    return run


CASES: list[tuple[float | None, float]] = [
    (1.0, 5.0),
    (INF, 0.01),
    (3.0, 0.02),
    (0.5, 1e3),
    (None, 1e-3),
]


@pytest.mark.parametrize(("kind", "limit"), quickly(CASES[1:2] + CASES[4:], CASES))
def test_the_bits_of_one_device(kind: float | None, limit: float) -> None:
    found, expected = train(2, 1, kind, limit), train_plainly(1, kind, limit)
    plain.assert_equal(found, expected)
    if kind is not None:
        assert all(norm > limit for norm in expected.norms)  # clipping was active


@pytest.mark.parametrize(("kind", "limit"), quickly(CASES[:1], CASES))
def test_in_processes_whatever_is_divided(
    gang: Callable[[int], Gang], kind: float | None, limit: float
) -> None:
    expected = train_plainly(1, kind, limit)
    for run in gang(2).run(train, 2, 1, kind, limit):
        plain.assert_equal(run, expected, whole=False)
    expected = train_plainly(2, kind, limit)
    for run in gang(2).run(train, 1, 2, kind, limit, zero=1):
        assert all(torch.equal(a, b) for a, b in zip(run.losses[:1], expected.losses, strict=False))
        for a, b in zip(run.norms, expected.norms, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=0)
        for name, param in run.params.items():
            torch.testing.assert_close(param, expected.params[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("zero", [1, 3])
def test_processes_and_one_process_have_the_same_norms(
    gang: Callable[[int], Gang], zero: int
) -> None:
    one = train(1, 2, INF, 0.01, zero=zero)
    for run in gang(2).run(train, 1, 2, INF, 0.01, zero=zero):
        assert all(torch.equal(a, b) for a, b in zip(run.norms, one.norms, strict=True))


def spoiled(value: float, n_stages: int, **options: Any) -> str:
    """One gradient of the last stage is not finite."""
    pipe = jobs.pipeline("gpt2", n_stages, options.pop("dp", 1), 2, **options)
    batch = models.batches("gpt2", 4, 1)[0]
    pipe.forward_backward(plain.cut(batch, pipe.data_shards)[pipe.data_shard])
    *_, (name, last) = pipe.named_parameters()
    assert last.grad is not None
    last.grad.view(-1)[0] = value
    before = {n: p.grad.clone() for n, p in pipe.named_parameters() if p.grad is not None}
    try:
        pipe.clip_grad_norm_(1.0, error_if_nonfinite=True)
    except GradientError as error:
        same = all(
            torch.equal(before[n].nan_to_num(), p.grad.nan_to_num())
            for n, p in pipe.named_parameters()
        )
        return f"{error} {same}"
    return name


@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_a_norm_that_is_not_finite_is_an_error(value: float) -> None:
    assert "drop them" in spoiled(value, 2)
    assert spoiled(value, 2).endswith("True")


def test_on_every_rank(gang: Callable[[int], Gang]) -> None:
    answers = gang(2).run(spoiled, math.nan, 2) + gang(2).run(spoiled, INF, 1, dp=2, zero=2)
    assert all("cannot be clipped" in answer for answer in answers)


def test_without_that_it_is_torchs() -> None:
    pipe, model = jobs.pipeline("gpt2", 2, 1, 2), models.build("gpt2")
    batch = models.batches("gpt2", 4, 1)[0]
    pipe.forward_backward(batch)
    plain.accumulate(model, batch, 1, 2)
    for params in (pipe.parameters(), model.parameters()):
        next(iter(params)).grad.view(-1)[0] = INF
    assert torch.equal(pipe.clip_grad_norm_(1.0), nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    named = dict(model.named_parameters())
    for name, param in pipe.named_parameters():
        assert torch.equal(param.grad.nan_to_num(7), named[name].grad.nan_to_num(7))


@pytest.fixture(scope="module")
def refusing() -> Any:
    """A pipeline that is asked for nothing that there is."""
    return jobs.pipeline("gpt2", 2, 1, 2, example_batch=models.batches("gpt2", 4, 1)[0])


@pytest.mark.parametrize("kind", [0, -1, -INF, math.nan, True, "many", None])
def test_norms_that_there_are_not(refusing: Any, kind: Any) -> None:
    with pytest.raises(OptionError, match="norm_type="):
        refusing.clip_grad_norm_(1.0, norm_type=kind)


@pytest.mark.parametrize("value", [-1.0, math.nan, "much"])
def test_values_that_clip_nothing(refusing: Any, value: Any) -> None:
    with pytest.raises(OptionError, match="clip_value="):
        refusing.clip_grad_value_(value)


# -- what is exchanged -----------------------------------------------------------------------------


def step_without_tensors(zero: int) -> float:
    """Whatever a step tells other ranks beside values and gradients, no tensor is pickled."""
    pipe = jobs.pipeline("gpt2", 1 if zero else 2, 2 if zero else 1, 2, zero=zero, max_grad_norm=1)
    batch = plain.cut(models.batches("gpt2", 8, 1)[0], pipe.data_shards)[pipe.data_shard]
    pipe.step(batch)

    def refuse(tensor: torch.Tensor, protocol: int) -> Any:
        raise AssertionError(f"a tensor of {tuple(tensor.shape)} is pickled, which takes 0.2 ms")

    with mock.patch.object(torch.Tensor, "__reduce_ex__", refuse):
        return float(pipe.step(batch))


@pytest.mark.parametrize("zero", [0, 2])
def test_a_step_pickles_no_tensors(gang: Callable[[int], Gang], zero: int) -> None:
    first, second = gang(2).run(step_without_tensors, zero)
    assert first == second

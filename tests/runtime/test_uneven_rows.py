"""Any number of rows: microbatches of unequal size in one step, each by the program of its size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pipecompile
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.options.microbatches import cut
from pipecompile.errors import BatchError
from support import jobs, models
from support.gang import Gang
from support.matrix import quickly
from support.weighed import IGNORED, Batch, accumulated, parted
from torch import nn


@given(st.integers(0, 200), st.integers(1, 40))
def test_parts_differ_by_at_most_a_row(rows: int, parts: int) -> None:
    sizes = cut(rows, parts)
    assert (len(sizes), sum(sizes)) == (parts, rows)
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def batch_of(name: str, rows: int, uneven: bool = True) -> Batch:
    """Rows that keep different numbers of labels, if they are to. Without a mask: untraced, Llama
    drops one that masks nothing in a microbatch, and rounds otherwise."""
    batch: Batch = dict(models.batches(name, rows, 1)[0])
    batch.pop("attention_mask", None)
    labels = batch["labels"].clone()
    for row in range(rows if uneven and labels.dim() > 1 else 0):
        labels[row, 2 + (5 * row) % (labels.shape[1] - 2) :] = IGNORED
    return batch | {"labels": labels}


def trained(
    name: str, n_stages: int, replicas: Sequence[int], microbatches: int, **options: Any
) -> tuple[torch.Tensor, Batch, torch.Tensor]:
    """Loss, gradients and an evaluation of a batch with so many rows per replica."""
    pipe = jobs.pipeline(name, n_stages, len(replicas), microbatches, **options)
    batch = batch_of(name, sum(replicas))
    if pipe.data_shards > 1:
        batch = parted(batch, replicas)[pipe.data_shard]
    loss = pipe.forward_backward(batch)
    grads = {n: p.grad.clone() for n, p in pipe.named_parameters() if p.grad is not None}
    return loss, grads, pipe.evaluate(batch)


CASES = [
    ("llama", 2, (7, 6), 4, "1f1b"),
    ("gpt2", 3, (5,), 3, "zb_h1"),
    ("bert-mlm", 4, (5, 4, 4), 2, "1f1b"),
    ("t5", 2, (3,), 2, "1f1b"),
    ("llama", 1, (2, 2, 1), 2, "1f1b"),
    ("gpt2", 2, (3,), 5, "1f1b"),
]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("name", "n_stages", "replicas", "microbatches", "schedule"), quickly(CASES[1:2], CASES)
)
def test_the_step_is_that_of_the_whole_batch(
    name: str, n_stages: int, replicas: tuple[int, ...], microbatches: int, schedule: str
) -> None:
    loss, grads, evaluation = trained(name, n_stages, replicas, microbatches, schedule=schedule)
    batch, shift = batch_of(name, sum(replicas)), name in ("llama", "gpt2")
    expected, wanted = accumulated(name, batch, replicas, microbatches, shift)
    assert torch.equal(loss, expected)
    assert not [key for key in wanted if not torch.equal(grads[key], wanted[key])]
    model = models.build(name)
    whole = model(**batch).loss
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-6, atol=0)
    with torch.no_grad():
        whole = model.eval()(**batch).loss
    torch.testing.assert_close(evaluation, whole, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_stages", "replicas", "options"),
    [
        (2, (3, 2), {}),
        (1, (3, 0), {"zero": 2}),
        (1, (0, 3), {"zero": 3}),
        (1, (2, 1), {"zero": 1}),
        (2, (1, 0), {"schedule": "zb_h1"}),
    ],
)
def test_replicas_may_have_fewer_rows_or_none(
    gang: Callable[[int], Gang],
    n_stages: int,
    replicas: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    expected, wanted = accumulated("llama", batch_of("llama", sum(replicas)), replicas, 2, True)
    size = n_stages * len(replicas)
    for loss, grads, evaluation in gang(size).run(
        trained, "llama", n_stages, replicas, 2, **options
    ):
        assert torch.equal(loss, expected)
        torch.testing.assert_close(evaluation, expected, rtol=1e-6, atol=0)
        for key, grad in grads.items():
            if grad.shape == wanted[key].shape:  # with zero= a rank has its rows
                torch.testing.assert_close(grad, wanted[key], rtol=1e-5, atol=1e-8)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("rows", quickly([1, 7], [1, 2, 5, 7]))
def test_one_pipeline_takes_batches_of_any_number_of_rows(rows: int) -> None:
    """Also a loss over rows, of a model whose training began with even ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    pipe = pipecompile.compile(
        model, 2, microbatches=4, loss_fn=lambda out, _: out.square().mean(), optimizer=jobs.SGD
    )
    pipe.forward_backward(torch.randn(8, 4))
    pipe.zero_grad()
    x = torch.randn(rows, 4)
    loss = pipe.forward_backward(x)
    other = copy.deepcopy(model)
    expected = other(x).square().mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    for mine, theirs in zip(pipe.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(pipe.forward(x), model(x), rtol=1e-6, atol=1e-7)


class Several(nn.Module):
    """Rows, a mean over them, a sum, and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.linear(x)
        return {"loss": y.square().mean(), "rows": y, "mean": y.mean(0), "sum": y.sum()}


def test_outputs_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    model, x = Several(), torch.randn(5, 4)
    pipe = pipecompile.compile(model, 1, 2, microbatches=4)
    found = pipe.forward(x)
    for name, value in model(x).items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-6, atol=1e-6)


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x).square().mean()


def test_a_row_that_counts_nothing_updates_no_buffer() -> None:
    pipe = pipecompile.compile(Counted(), 1, microbatches=4, optimizer=jobs.SGD)
    pipe.step(torch.randn(9, 4))
    assert pipe.state_dict()["calls"] == 4
    with pytest.raises(BatchError, match=r"fewer rows than .* updates buffer 'calls'"):
        pipe.step(torch.randn(3, 4))
    with pytest.raises(BatchError, match="the batch has 0 rows"):
        pipe.step(torch.randn(0, 4))


@pytest.mark.slow
@pytest.mark.parametrize("rows", quickly([4], [4, 7]))  # of 4 a microbatch has none
def test_the_first_steps_are_compared_too(rows: int) -> None:
    pipe = jobs.pipeline("gpt2", 2, 2, 3, verify=1)
    pipe.step(batch_of("gpt2", rows))
    assert "gradients     identical to the last bit" in pipe.verification

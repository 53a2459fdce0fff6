"""Labels of uneven length in models of transformers: as one device has them."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from pipecompile.compiler.ir.actions import Action
from pipecompile.errors import BatchError
from pipecompile.runtime.batch_loss import BatchLoss
from pipecompile.runtime.executor import Executor
from pipecompile.runtime.transport.neighbours import SWITCH
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly
from support.weighed import IGNORED, Batch, accumulated


def uneven(name: str, rows: int) -> Batch:
    """A batch whose rows keep very different numbers of labels; those of the first keep none."""
    batch: Batch = dict(models.batches(name, rows, 1)[0])
    labels = batch["labels"].clone()
    for row in range(rows):
        labels[row, (5 * row) % labels.shape[1] :] = IGNORED
    return batch | {"labels": labels}


def weighed(
    name: str, n_stages: int, dp: int, microbatches: int, **options: Any
) -> tuple[torch.Tensor, Batch]:
    pipe = jobs.pipeline(name, n_stages, dp, microbatches, **options)
    batch = uneven(name, 2 * dp * microbatches)
    share = {k: v.chunk(pipe.data_shards)[pipe.data_shard] for k, v in batch.items()}
    loss = pipe.forward_backward(share)
    return loss, {n: p.grad for n, p in pipe.named_parameters() if p.grad is not None}


CASES = [
    ("llama", 2, 1, 4, "1f1b"),
    ("t5", 4, 1, 2, "1f1b"),
    ("bert-mlm", 3, 2, 2, "zb_h1"),
    ("llama", 1, 2, 2, "1f1b"),
    ("gpt2", 2, 3, 2, "1f1b"),
]


@pytest.mark.parametrize(
    ("name", "n_stages", "dp", "microbatches", "schedule"), quickly([CASES[0], CASES[2]], CASES)
)
def test_labels_of_uneven_length_count_as_on_one_device(
    name: str, n_stages: int, dp: int, microbatches: int, schedule: str
) -> None:
    """Bit for bit the plain loop over the same microbatches with the same weights; and one whole
    batch up to how sums round."""
    loss, grads = weighed(name, n_stages, dp, microbatches, schedule=schedule)
    batch = uneven(name, 2 * dp * microbatches)
    shift = name in ("llama", "gpt2")
    expected, wanted = accumulated(name, batch, [2 * microbatches] * dp, microbatches, shift)
    assert torch.equal(loss, expected)
    wrong = [each for each in wanted if not torch.equal(grads[each], wanted[each])]
    assert not wrong
    model = models.build(name)
    found = model(**batch).loss
    found.backward()
    torch.testing.assert_close(loss, found.detach(), rtol=1e-6, atol=0)
    for key, param in model.named_parameters():
        assert param.grad is not None
        assert (grads[key] - param.grad).norm() <= 1e-5 * param.grad.norm() + 1e-9, key


@pytest.mark.parametrize(("n_stages", "dp"), quickly([(1, 2)], [(1, 2), (2, 2)]))
def test_in_processes_too(gang: Callable[[int], Gang], n_stages: int, dp: int) -> None:
    expected, wanted = weighed("llama", n_stages, dp, 2)
    for loss, grads in gang(n_stages * dp).run(weighed, "llama", n_stages, dp, 2):
        assert torch.equal(loss, expected)
        assert all(torch.equal(grad, wanted[name]) for name, grad in grads.items())


def refused(name: str, n_stages: int, dp: int) -> str:
    pipe = jobs.pipeline(name, n_stages, dp, 2)
    batch = uneven(name, 4)
    batch["labels"][:] = IGNORED
    try:
        pipe.step(batch)
    except BatchError as error:
        return str(error)
    return "nothing"


def test_every_rank_hears_that_nothing_counts(gang: Callable[[int], Gang]) -> None:
    for said in gang(2).run(refused, "gpt2", 2, 1):
        assert "nothing in this batch counts" in said


def counted_late(marked: Path) -> tuple[torch.Tensor, Batch]:
    """As `weighed`; the last stage counts once the first has computed a forward."""
    compute, count = Executor._compute, BatchLoss._count
    pipe, batch = jobs.pipeline("llama", 2, 1, 2), uneven("llama", 4)
    pipe.compile_for(batch)

    def computing(self: Executor, action: Action, *rest: Any) -> None:
        compute(self, action, *rest)
        if action.stage == 0:
            marked.touch()

    def counting(*given: Any) -> list[float]:
        deadline = time.monotonic() + 30
        while not marked.exists():
            assert time.monotonic() < deadline, "the first stage waits for what is counted"
            time.sleep(1e-3)
        return count(*given)

    with (
        mock.patch.object(Executor, "_compute", computing),
        mock.patch.object(BatchLoss, "_count", counting),
    ):
        loss = pipe.forward_backward(batch)
    return loss, {n: p.grad for n, p in pipe.named_parameters() if p.grad is not None}


def test_forwards_begin_while_labels_are_counted(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    expected, wanted = weighed("llama", 2, 1, 2)
    for loss, grads in gang(2).run(counted_late, tmp_path / "computed"):
        assert torch.equal(loss, expected)
        assert all(torch.equal(grad, wanted[name]) for name, grad in grads.items())


def with_one_refused(n_stages: int, dp: int, switch: str, **options: Any) -> list[Any]:
    """Two batches that count, and between them one in which nothing does; after each the loss, or
    what is said, and the gradients."""
    with mock.patch.dict(os.environ, {SWITCH: switch}):
        pipe = jobs.pipeline("llama", n_stages, dp, 2, **options)
        batch = uneven("llama", 4 * dp)
        nothing = batch | {"labels": torch.full_like(batch["labels"], IGNORED)}
        found: list[Any] = []
        for each in (batch, nothing, batch):
            share = {k: v.chunk(pipe.data_shards)[pipe.data_shard] for k, v in each.items()}
            try:
                found.append(pipe.forward_backward(share))
            except BatchError as error:
                found.append(str(error))
            named = pipe.named_parameters()
            found.append({n: p.grad.clone() for n, p in named if p.grad is not None})
    return found


REFUSED: list[Any] = [
    (2, 1, "", {}),
    (2, 1, "off", {}),
    (1, 2, "", {"zero": 1}),
    pytest.param(2, 2, "off", {"zero": 1}, marks=pytest.mark.slow),
    pytest.param(2, 2, "", {"zero": 3}, marks=pytest.mark.slow),
    pytest.param(
        2, 1, "", {"schedule": "interleaved", "virtual_stages": 2}, marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("n_stages", "dp", "switch", "options"), REFUSED)
def test_a_batch_that_is_refused_changes_nothing(
    gang: Callable[[int], Gang], n_stages: int, dp: int, switch: str, options: dict[str, Any]
) -> None:
    """Though its first forwards have run by then; and the pipeline goes on."""
    for first, grads, said, kept, again, more in gang(n_stages * dp).run(
        with_one_refused, n_stages, dp, switch, **options
    ):
        assert "nothing in this batch counts" in said
        assert grads
        assert plain.equal(kept, grads)
        assert torch.equal(again, first)
        assert not any(torch.equal(more[name], grads[name]) for name in grads)
        assert all(torch.allclose(more[name], 2 * grads[name], atol=1e-6) for name in grads)


def items(batch: Batch) -> torch.Tensor:
    return (batch["labels"][:, 1:] != IGNORED).sum()


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_number_of_items_is_that_of_the_global_batch() -> None:
    """Losses are parts of one sum then."""
    model, batch = models.llama(num_hidden_layers=1), uneven("llama", 8)
    batch["num_items_in_batch"] = items(batch)
    pipe = pipecompile.compile(model, 2, 2, microbatches=2, optimizer=jobs.SGD)
    loss = pipe.forward_backward(batch)
    found = copy.deepcopy(model)
    whole = found(**batch).loss
    whole.backward()
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-6, atol=0)
    for (name, param), other in zip(pipe.named_parameters(), found.parameters(), strict=True):
        assert (param.grad - other.grad).norm() <= 1e-5 * other.grad.norm(), name
    with pytest.raises(BatchError, match="num_items_in_batch"):
        pipe.step(batch | {"num_items_in_batch": items(batch) // 2})


def with_own_items() -> str:
    pipe = jobs.pipeline("llama", 1, 2, 2)
    batch = uneven("llama", 8)
    share = {key: value.chunk(2)[pipe.data_shard] for key, value in batch.items()}
    try:
        pipe.step(share | {"num_items_in_batch": items(share)})
    except BatchError as error:
        return str(error)
    return "nothing"


@pytest.mark.slow
def test_replicas_with_numbers_of_their_own_items_are_refused(gang: Callable[[int], Gang]) -> None:
    for said in gang(2).run(with_own_items):
        assert "give every rank that of the global batch" in said


@pytest.mark.slow
def test_balancing_losses_keep_their_own_mean() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = jobs.pipeline("mixtral", 2, 1, 2)
        pipe.step(models.batches("mixtral", 4, 1)[0])
    notes = dict(pipe.plan.notes)
    assert "a part of which each microbatch has its own" in notes["loss"]


def test_outputs_have_the_loss_of_the_whole_batch() -> None:
    model, batch = models.llama(num_hidden_layers=1), uneven("llama", 8)
    pipe = pipecompile.compile(model, 2, 2, microbatches=2, optimizer=jobs.SGD)
    model.eval()
    with torch.no_grad():
        expected = model(**batch)
    found = pipe.forward(batch)
    torch.testing.assert_close(found["loss"], expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(pipe.evaluate(batch), expected.loss, rtol=1e-6, atol=0)
    nothing = batch | {"labels": torch.full_like(batch["labels"], IGNORED)}
    assert pipe.forward(nothing)["loss"].isnan()  # as one device says


def joined(n_stages: int, dp: int) -> torch.Tensor | None:
    pipe = jobs.pipeline("llama", n_stages, dp, 2)
    batch = uneven("llama", 4 * dp)
    share = {k: v.chunk(pipe.data_shards)[pipe.data_shard] for k, v in batch.items()}
    output = pipe.forward(share)
    return None if output is None else output["loss"]


@pytest.mark.slow
def test_outputs_of_a_replica_are_those_of_its_rows(gang: Callable[[int], Gang]) -> None:
    model, batch = models.build("llama").eval(), uneven("llama", 8)
    with torch.no_grad():
        expected = [model(**{k: v.chunk(2)[r] for k, v in batch.items()}).loss for r in range(2)]
    found = [loss for loss in gang(4).run(joined, 2, 2) if loss is not None]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=0)

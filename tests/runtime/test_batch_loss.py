"""The loss of a batch is that of one device, whatever microbatches and replicas it is cut into."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.errors import BatchError, LossError, OptionError
from support import jobs
from support.matrix import quickly
from torch import nn
from torch.nn import functional as F  # noqa: N812

WIDTH, CLASSES, TOKENS = 8, 7, 5
IGNORED = -100
CLASS_WEIGHTS = torch.linspace(0.5, 2.0, CLASSES)
Batch = dict[str, torch.Tensor]
Loss = Callable[[Any, Any], torch.Tensor]


class Tagger(nn.Module):
    """Labels for each token of a row."""

    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.inner(self.embed(ids))))
        return out


def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger()


def tagged(rows: int = 8) -> Batch:
    """Rows that keep very different numbers of labels; those of the first two keep none."""
    made = torch.Generator().manual_seed(3)
    ids = torch.randint(11, (rows, TOKENS), generator=made)
    labels = torch.randint(CLASSES, (rows, TOKENS), generator=made)
    for row in range(rows):
        labels[row, 0 if row < 2 else 1 + (3 * row) % TOKENS :] = IGNORED
    return {"ids": ids, "labels": labels}


def kept(batch: Batch) -> torch.Tensor:
    return (batch["labels"] != IGNORED).float()


def flat(out: torch.Tensor) -> torch.Tensor:
    return out.reshape(-1, CLASSES)


def each(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Of each token."""
    return F.cross_entropy(flat(out), batch["labels"].clamp(min=0).reshape(-1), reduction="none")


def cross_entropy(out: torch.Tensor, batch: Batch, **options: Any) -> torch.Tensor:
    return F.cross_entropy(flat(out), batch["labels"].reshape(-1), **options)


cross_entropy.traced_once = True  # type: ignore[attr-defined]


def two_terms(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    second = torch.where(torch.arange(TOKENS) < 2, batch["labels"], IGNORED)
    other = F.cross_entropy(flat(out * 0.5), second.reshape(-1))
    return (cross_entropy(out, batch) + other) / 2 + 0.1 * out.square().mean()


two_terms.traced_once = True  # type: ignore[attr-defined]


def shifted(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    labels = F.pad(batch["labels"], (0, 1), value=IGNORED)[..., 1:].contiguous()
    return F.cross_entropy(flat(out.float()), labels.view(-1), ignore_index=IGNORED)


def written(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Labels that are made by writing into others."""
    labels = torch.full_like(batch["labels"], IGNORED)
    labels[:, 1:] = batch["labels"][:, :-1]
    labels.masked_fill_(labels == 2, IGNORED)
    return F.cross_entropy(out.transpose(1, 2), labels)


def masked(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    mask = kept(batch).reshape(-1)
    return (each(out, batch) * mask).sum() / mask.sum()


def clamped(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    mask = kept(batch).reshape(-1)
    return (each(out, batch) * mask).sum() / mask.sum().clamp(min=1.0)


def softened(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    mask = kept(batch).reshape(-1)
    return (each(out, batch) * mask).sum() / (mask.sum() + 1e-3)


def averaged(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    mask = kept(batch).reshape(-1)
    return (each(out, batch) * mask).mean() / mask.mean()


def by_row(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    losses = each(out, batch).view(-1, TOKENS) * kept(batch)
    return (losses.sum(1) / (kept(batch).sum(1) + 1)).mean()


def log_likelihood(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    return F.nll_loss(out.log_softmax(-1).transpose(1, 2), batch["labels"])


LOSSES: dict[str, Loss] = {
    "cross entropy": cross_entropy,
    "of classes by weight": partial(cross_entropy, weight=CLASS_WEIGHTS),
    "smoothed": partial(cross_entropy, label_smoothing=0.1),
    "smoothed by weight": partial(cross_entropy, label_smoothing=0.1, weight=CLASS_WEIGHTS),
    "another index ignored": lambda out, b: F.cross_entropy(
        flat(out), b["labels"].clamp(min=0).reshape(-1), ignore_index=0
    ),
    "summed": partial(cross_entropy, reduction="sum"),
    "summed, with a penalty": lambda out, b: cross_entropy(out, b, reduction="sum") + 0.5,
    "nll": log_likelihood,
    "two terms": two_terms,
    "shifted": shifted,
    "written": written,
    "masked": masked,
    "clamped": clamped,
    "softened": softened,
    "averaged": averaged,
    "by row": by_row,
    "squares": lambda out, b: F.mse_loss(out[..., 0], kept(b)),
    "squares over rows": lambda out, b: ((out[..., 0] - kept(b)) ** 2).sum() / len(out),
    "stacked": lambda out, b: torch.stack(
        [cross_entropy(out, b), cross_entropy(2 * out, b)]
    ).mean(),
}


def whole(model: nn.Module, loss_fn: Loss, batch: Batch) -> tuple[torch.Tensor, Batch]:
    """Loss and gradients of one device."""
    model = copy.deepcopy(model)
    loss = loss_fn(model(batch["ids"]), batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(pipe: Any, loss: torch.Tensor, expected: tuple[torch.Tensor, Batch]) -> None:
    """Sums over microbatches round otherwise than one over the batch does."""
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    for name, param in pipe.named_parameters():
        want = expected[1][name]
        assert (param.grad - want).norm() <= 2e-6 * want.norm(), name


UNLIKE = [
    "cross entropy",
    "another index ignored",
    "summed",
    "two terms",
    "written",
    "masked",
    "averaged",
    "by row",
    "squares over rows",
]


@pytest.mark.parametrize("name", quickly(UNLIKE, LOSSES))
@pytest.mark.filterwarnings("error::UserWarning")
def test_the_loss_is_that_of_the_whole_batch(name: str) -> None:
    model, batch, loss_fn = tagger(), tagged(), LOSSES[name]
    pipe = pipecompile.compile(model, 2, 2, microbatches=2, loss_fn=loss_fn, optimizer=jobs.SGD)
    loss = pipe.forward_backward(batch)
    assert_close(pipe, loss, whole(model, loss_fn, batch))
    torch.testing.assert_close(pipe.evaluate(batch), loss, rtol=1e-6, atol=0)
    pipe.zero_grad()
    more = {key: value.flip(0) for key, value in batch.items()}  # counts are those of each batch
    assert_close(pipe, pipe.forward_backward(more), whole(model, loss_fn, more))


@pytest.mark.slow
def test_terms_of_a_loss_in_double_precision_are_as_exact() -> None:
    model, batch = tagger().double(), tagged()
    pipe = pipecompile.compile(model, 2, microbatches=2, loss_fn=two_terms, optimizer=jobs.SGD)
    loss, grads = whole(model, two_terms, batch)
    torch.testing.assert_close(pipe.forward_backward(batch), loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(pipe.evaluate(batch), loss, rtol=1e-14, atol=0)
    for name, param in pipe.named_parameters():
        assert (param.grad - grads[name]).norm() <= 1e-13 * grads[name].norm(), name


@pytest.mark.filterwarnings("error::UserWarning")
def test_single_rows_may_be_traced_in_another_way() -> None:
    class OneByOne(Tagger):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids if len(ids) > 1 else ids.clone())

    torch.manual_seed(0)
    model, batch = OneByOne(), tagged()
    pipe = pipecompile.compile(
        model, 1, microbatches=8, loss_fn=two_terms, optimizer=jobs.SGD, example_batch=batch
    )
    loss = pipe.forward_backward(batch)
    assert_close(pipe, loss, whole(model, two_terms, batch))


# -- losses that the graph does not tell --------------------------------------------------------


def contrastive(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    pooled = F.normalize((out * kept(batch)[..., None]).sum(1) + 1, dim=-1)
    return F.cross_entropy(pooled @ pooled.t(), torch.arange(len(pooled)))


def centred(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    return F.mse_loss((out - out.mean(0))[..., 0], kept(batch))


def rooted(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    return F.mse_loss(out[..., 0], kept(batch)).sqrt()


def multiplied(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A mean times another, and one times itself."""
    mean = F.mse_loss(out[..., 0], kept(batch))
    return mean * out.mean() + mean * mean


def over_rows(out: torch.Tensor, batch: Batch) -> torch.Tensor:
    return F.mse_loss(out[..., 0].softmax(0), kept(batch))


UNTOLD: dict[str, tuple[Loss, str]] = {
    "contrastive": (contrastive, "compares rows with each other"),
    "centred": (centred, "reads what is computed over all rows"),
    "over rows": (over_rows, "goes along rows"),
    "rooted": (rooted, "cannot be told"),
    "multiplied": (multiplied, "cannot be told"),
}


@pytest.mark.parametrize("name", quickly(["contrastive"], UNTOLD))
def test_what_couples_rows_is_said_once_and_taken_as_it_is(name: str) -> None:
    loss_fn, said = UNTOLD[name]
    model, batch = tagger(), tagged()
    compiled = partial(
        pipecompile.compile, model, 2, microbatches=4, loss_fn=loss_fn, optimizer=jobs.SGD
    )
    pipe = compiled()
    with pytest.warns(UserWarning, match=said):
        loss = pipe.forward_backward(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.evaluate(batch)  # it has been said
    pieces = [{k: v.chunk(4)[i] for k, v in batch.items()} for i in range(4)]
    each = torch.stack([loss_fn(model(piece["ids"]), piece) for piece in pieces])
    torch.testing.assert_close(loss, each.mean().detach(), rtol=1e-6, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compiled(loss_normalization="microbatch").evaluate(batch), loss)
        one = pipecompile.compile(model, 2, microbatches=1, loss_fn=loss_fn, optimizer=jobs.SGD)
        assert_close(one, one.forward_backward(batch), whole(model, loss_fn, batch))
    with pytest.raises(LossError, match='loss_normalization="batch": .*' + said):
        compiled(loss_normalization="batch").step(batch)


def test_batch_norm_has_the_statistics_of_microbatches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    x = torch.randn(8, 4)
    pipe = pipecompile.compile(
        model, 2, microbatches=2, loss_fn=lambda out, _: out.square().mean(), optimizer=jobs.SGD
    )
    with pytest.warns(UserWarning, match="module '1' takes the statistics of its batch norm"):
        pipe.step(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.evaluate(x)  # by running statistics: each row alone


@pytest.mark.parametrize("kind", ["labels", "loss_weight"])
def test_a_batch_in_which_nothing_counts_is_refused(kind: str) -> None:
    batch = tagged()
    batch["labels"][:] = IGNORED
    options: dict[str, Any] = {}
    if kind == "loss_weight":
        options["loss_weight"] = lambda piece: (piece["labels"] != IGNORED).sum()
    pipe = pipecompile.compile(
        tagger(), 2, microbatches=2, loss_fn=cross_entropy, optimizer=jobs.SGD, **options
    )
    with pytest.raises(BatchError, match="nothing in this batch counts"):
        pipe.step(batch)
    pipe.step(tagged())


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_user_may_say_what_microbatches_count() -> None:
    model, batch = tagger(), tagged()

    def loss_fn(out: torch.Tensor, piece: Batch) -> torch.Tensor:
        mask = kept(piece).reshape(-1)
        count = torch.where(mask.sum() > 0, mask.sum(), torch.ones(()))
        return ((each(out, piece) * mask).sum() / count).exp().log()

    pipe = pipecompile.compile(
        model,
        2,
        2,
        microbatches=2,
        loss_fn=loss_fn,
        loss_weight=lambda piece: kept(piece).sum(),
        optimizer=jobs.SGD,
    )
    assert_close(pipe, pipe.forward_backward(batch), whole(model, loss_fn, batch))


@pytest.mark.parametrize(
    ("found", "said"),
    [(-1.0, "returned -1.0"), (float("nan"), "returned nan"), ("many", "returned a str")],
)
def test_loss_weights_that_are_none_are_refused(found: Any, said: str) -> None:
    pipe = pipecompile.compile(
        tagger(), 1, microbatches=2, loss_fn=cross_entropy, loss_weight=lambda _: found
    )
    with pytest.raises(BatchError, match=said):
        pipe.forward_backward(tagged())


def test_a_loss_weight_needs_microbatches_that_count_differently() -> None:
    with pytest.raises(OptionError, match="loss_weight= has no effect"):
        pipecompile.compile(tagger(), 1, loss_weight=lambda _: 1.0, loss_normalization="microbatch")


def test_the_first_steps_are_compared_with_weighed_ones() -> None:
    def compiled(loss_fn: Loss) -> Any:
        return pipecompile.compile(
            tagger(), 2, 2, microbatches=2, loss_fn=loss_fn, optimizer=jobs.SGD, verify=2
        )

    pipe = compiled(cross_entropy)
    pipe.step(tagged())
    pipe.step(tagged())
    assert "step 2  gradients     identical to the last bit" in pipe.verification
    with pytest.raises(BatchError, match="cannot weigh the terms of one loss apart"):
        compiled(two_terms).step(tagged())

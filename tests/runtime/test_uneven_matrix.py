"""Ragged rows and uneven labels under every division: as a plain loop, and as one whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pipecompile
import pytest
import torch
import transformers as hf
from support import jobs, models
from support.matrix import quickly
from support.weighed import IGNORED, Batch, accumulate, divided
from torch import nn
from torch.nn.functional import cross_entropy

MICROBATCHES = 2


def tagger() -> nn.Module:
    return hf.BertForTokenClassification(hf.BertConfig(num_labels=5, **models._BERT))


def own_loss(output: Any, batch: Batch) -> torch.Tensor:
    """A sum over the tokens that a mask keeps, by their number."""
    logits, targets = output.logits[:, :-1], batch["labels"][:, 1:]
    each = cross_entropy(logits.flatten(0, 1), targets.flatten().clamp(min=0), reduction="none")
    mask = (targets != IGNORED).flatten().float()
    return (each * mask).sum() / mask.sum()


own_loss.traced_once = True  # type: ignore[attr-defined]


def of_model(model: nn.Module, piece: Batch) -> torch.Tensor:
    loss: torch.Tensor = model(**piece).loss
    return loss


def of_own(model: nn.Module, piece: Batch) -> torch.Tensor:
    return own_loss(model(input_ids=piece["input_ids"]), piece)


@dataclass(frozen=True)
class Family:
    """A model, and how it comes to its loss.

    Attributes:
        inputs: a batch of so many rows.
        words: how many labels there are; 0 for those of the tokens.
        shift: whether the loss leaves out the first label of a row.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Batch] = models.tokens
    words: int = 0
    shift: bool = False
    loss: Callable[[nn.Module, Batch], torch.Tensor] = of_model

    def batch(self, rows: int, uneven: bool) -> Batch:
        torch.manual_seed(rows)
        batch = self.inputs(rows)
        labels = batch["labels"] = batch["labels"] % (self.words or models.VOCABULARY)
        if uneven and labels.dim() == 1:
            labels[1::3] = IGNORED
        elif uneven:
            for row, mine in enumerate(labels):
                mine[2 + (5 * row) % (len(mine) - 2) :] = IGNORED
        return batch

    def count(self, piece: Batch) -> int:
        labels = piece["labels"][:, 1:] if self.shift else piece["labels"]
        return int((labels != IGNORED).sum())


FAMILIES = {
    "llama": Family(models.llama, shift=True),
    "tagger": Family(tagger, words=5),
    "t5": Family(models.t5),
    "gpt2": Family(models.gpt2, shift=True, loss=of_own),
    "bert-mlm": Family(models.bert_mlm),
    "bart": Family(models.bart),
    "bert-classifier": Family(models.bert_classifier, models.classified),
    "vit": Family(models.vit, models.images),
}
KINDS = {"ragged": (1, False), "labels": (0, True), "both": (1, True)}
"""Rows more than replicas and microbatches divide, and whether labels are uneven."""

SCHEDULES = ("1f1b", "zb_h1")
"""One with whole backwards, and one with split ones; `test_schedules` has the others."""
CASES = list(product(FAMILIES, KINDS, (1, 2, 3, 4), (1, 2, 3), SCHEDULES))
COVERING = [
    (
        family,
        list(KINDS)[(f + s) % 3],
        s + 1,
        1 + (f + 2 * s) % 3,
        list(SCHEDULES)[(f + s // 2) % len(SCHEDULES)],
    )
    for f, family in enumerate(list(FAMILIES)[:4])
    for s in range(4)
]
"""Each of four families with each value of every axis."""
QUICK = [
    ("gpt2", "ragged", 1, 1, "zb_h1"),
    ("tagger", "labels", 4, 2, "1f1b"),
    ("gpt2", "both", 3, 2, "1f1b"),
    ("gpt2", "labels", 2, 3, "zb_h1"),
]


def test_the_quick_part_covers_every_axis() -> None:
    assert set(QUICK) < set(COVERING)
    for family in (None, *list(FAMILIES)[:4]):
        covering = [case for case in COVERING if case[0] == family] if family else QUICK
        mine = [case[1:] for case in covering]
        for found, values in zip(
            zip(*mine, strict=True), zip(*(c[1:] for c in CASES), strict=True), strict=True
        ):
            assert set(found) == set(values)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(("name", "kind", "n_stages", "dp", "schedule"), quickly(QUICK, CASES))
def test_the_loss_is_that_of_the_whole_batch(
    name: str, kind: str, n_stages: int, dp: int, schedule: str
) -> None:
    family, (more, uneven) = FAMILIES[name], KINDS[kind]
    rows = 2 * MICROBATCHES * dp + more
    batch = family.batch(rows, uneven)
    replicas = [2 * MICROBATCHES + (more and r == 0) for r in range(dp)]

    def build() -> nn.Module:
        torch.manual_seed(0)
        return family.build()

    pipe = pipecompile.compile(
        build(),
        n_stages,
        dp,
        microbatches=MICROBATCHES,
        schedule=schedule,
        optimizer=jobs.SGD,
        loss_fn=own_loss if family.loss is of_own else None,
    )
    loss = pipe.forward_backward(batch)
    grads = {key: param.grad for key, param in pipe.named_parameters()}
    pieces = divided(batch, replicas, MICROBATCHES)
    expected, wanted = accumulate(build(), pieces, MICROBATCHES, family.count, family.loss)
    assert torch.equal(loss, expected)
    assert not [key for key, grad in wanted.items() if not torch.equal(grads[key], grad)]
    model = build()
    whole = family.loss(model, batch)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-6, atol=0)
    for key, param in model.named_parameters():
        if param.grad is not None:
            assert (grads[key] - param.grad).norm() <= 1e-5 * param.grad.norm() + 1e-9, key

"""Batches that are padded to a few lengths; packed ones, which are not padded at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pipecompile
import pytest
import torch
import transformers as hf
from pipecompile.data import pad_to_multiple
from pipecompile.errors import BatchError, OptionError
from support import jobs, models
from support.matrix import quickly
from support.weighed import IGNORED
from torch.nn.utils.rnn import pad_sequence

Batch = dict[str, torch.Tensor]


def collated(lengths: list[int]) -> Batch:
    torch.manual_seed(sum(lengths))
    rows = [torch.randint(64, (length,)) for length in lengths]
    tokens = pad_sequence(rows, batch_first=True)
    labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    return {"input_ids": tokens, "labels": labels, "kind": torch.zeros(len(rows), 3)}


def test_lengths_are_multiples_and_the_rest_is_there() -> None:
    plain, padded = collated([5, 9, 3]), pad_to_multiple(collated, 8)([5, 9, 3])
    assert padded["input_ids"].shape == padded["labels"].shape == (3, 16)
    assert padded["kind"] is not plain["kind"]
    assert torch.equal(padded["kind"], plain["kind"])
    for key, value in {"input_ids": 0, "labels": IGNORED}.items():
        assert torch.equal(padded[key][:, :9], plain[key])
        assert bool((padded[key][:, 9:] == value).all())
    assert padded["attention_mask"].tolist() == [[1] * 9 + [0] * 7] * 3
    assert "attention_mask" not in pad_to_multiple(collated, 8, mask=None)([5, 9, 3])
    assert pad_to_multiple(collated, 3)([5, 9, 3])["input_ids"].shape == (3, 9)


@pytest.mark.parametrize(
    ("collate", "options", "message"),
    [
        (collated, {"values": {"labels": 0}}, "'input_ids' is as long as the sequence"),
        (collated, {"values": {"words": 0}}, "are to have one length: they have none"),
        (lambda _: {"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2, 4)}, {}, r"\[3, 4\]"),
    ],
)
def test_what_cannot_be_padded(
    collate: Callable[[Any], Batch], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BatchError, match=message):
        pad_to_multiple(collate, 8, **options)([5, 9])


def test_a_bad_multiple() -> None:
    with pytest.raises(OptionError, match="multiple=0"):
        pad_to_multiple(collated, 0)


@pytest.mark.parametrize("layers", quickly([1], [1, 3]))
def test_padding_changes_no_loss(layers: int) -> None:
    """Of a model that looks both ways, but for rounding; a few lengths have a few programs."""
    torch.manual_seed(0)
    model = hf.BertForMaskedLM(hf.BertConfig(**models._BERT | {"num_hidden_layers": layers}))
    pipe = pipecompile.compile(copy.deepcopy(model), 2, microbatches=1)
    model.eval()
    lengths = [[5, 9], [7, 3], [10, 4], [6, 6]]
    for each in lengths:
        batch = collated(each)
        del batch["kind"]
        with torch.no_grad():
            mask = torch.ones_like(batch["input_ids"])
            expected = model(**batch, attention_mask=mask).loss
        collate = pad_to_multiple(lambda _, batch=batch: batch, 8)
        torch.testing.assert_close(pipe.evaluate(collate(each)), expected, rtol=1e-5, atol=0)
    assert len(pipe._session.loaded) == 2


def packed(documents: list[list[int]]) -> Batch:
    """Documents one after the other, of whose places each begins anew."""
    place = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    tokens = torch.randint(64, place.shape)
    return {
        "input_ids": tokens,
        "position_ids": place,
        "labels": torch.where(place == 0, IGNORED, tokens),
    }


@pytest.mark.slow
@pytest.mark.parametrize("layers", quickly([1], [1, 3]))
def test_packed_documents_do_not_see_each_other(layers: int) -> None:
    """Two rows of several documents, cut into microbatches, against each document by itself; and
    what comes before in the row is nothing to a document."""
    torch.manual_seed(0)
    model = models.llama(num_hidden_layers=layers)
    model.config.use_cache = False  # or transformers does not look for packed documents
    pipe = pipecompile.compile(copy.deepcopy(model), 2, microbatches=2, optimizer=jobs.SGD)
    for documents in ([[8, 4], [2, 4, 6]],):
        batch = packed(documents)
        loss = pipe.forward_backward(batch)
        kept = int((batch["labels"][:, 1:] != IGNORED).sum())
        total = torch.zeros(())
        for row, lengths in enumerate(documents):
            ends = torch.tensor(lengths).cumsum(0).tolist()
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                tokens = batch["input_ids"][row : row + 1, start:end]
                alone = model(input_ids=tokens, labels=tokens).loss * (end - start - 1) / kept
                alone.backward()
                total += alone.detach()
        torch.testing.assert_close(loss, total, rtol=1e-5, atol=0)
        for name, param in pipe.named_parameters():
            expected = model.get_parameter(name).grad
            assert expected is not None
            assert param.grad is not None
            torch.testing.assert_close(param.grad, expected, rtol=1e-4, atol=1e-6)
        pipe.zero_grad()
        model.zero_grad()
    other = copy.deepcopy(batch)
    other["input_ids"][:, :2] = 1  # of the first documents, and the second ones are further on
    outputs = [pipe.forward(each).logits for each in (batch, other)]
    assert torch.equal(outputs[0][0, 8:], outputs[1][0, 8:])
    assert not torch.equal(outputs[0][0, :8], outputs[1][0, :8])

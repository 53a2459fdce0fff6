"""Flattened batches are cut between documents."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.data import cut_documents
from pipecompile.errors import BatchError, OptionError
from transformers import DataCollatorWithFlattening

Batch = dict[str, Any]


def batch_of(lengths: Sequence[int], **more: Any) -> Batch:
    """Of all forms in which tokens and documents come."""
    count, borders = sum(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    tokens = torch.arange(count)
    places = torch.cat([torch.arange(n) for n in lengths]) if lengths else tokens
    return {
        "input_ids": tokens[None],
        "position_ids": places[None] + 2,
        "labels": torch.where(places == 0, -100, tokens)[None],
        "flat": torch.stack([tokens, -tokens], 1),
        "kinds": torch.arange(len(lengths)) + 100,
        "cu_seqlens": borders,
        "max_seqlen": max(lengths, default=0),
        "scale": torch.tensor(0.5),
        "name": "text",
        **more,
    }


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 30), max_size=20).filter(lambda lengths: sum(lengths) != len(lengths)),
    st.integers(1, 8),
    st.booleans(),
)
def test_nothing_is_lost_and_pieces_are_balanced(
    lengths: list[int], pieces: int, bordered: bool
) -> None:
    batch = batch_of(lengths)
    if not bordered:
        del batch["cu_seqlens"]
    made = cut_documents(batch, pieces)
    assert len(made) == pieces
    for key, dim in {"input_ids": 1, "position_ids": 1, "labels": 1, "flat": 0, "kinds": 0}.items():
        assert torch.equal(torch.cat([piece[key] for piece in made], dim), batch[key])
    found, sizes = [], []
    for piece in made:
        size = piece["input_ids"].shape[1]
        documents = lengths[len(found) : len(found) + len(piece["kinds"])]
        assert sum(documents) == size
        if bordered:
            assert piece["cu_seqlens"].tolist() == [0, *accumulate(documents)]
            assert piece["cu_seqlens"].dtype is torch.int32
        assert piece["max_seqlen"] == max(documents, default=0)
        assert (piece["name"], float(piece["scale"])) == ("text", 0.5)
        sizes.append(size)
        found += documents
    assert found == lengths
    longest, even = max(lengths, default=0), sum(lengths) / pieces
    assert all(abs(size - even) <= longest for size in sizes)
    assert sum(size > 0 for size in sizes) == min(pieces, len(lengths))
    assert sorted(sizes, key=lambda size: size == 0) == sizes  # what is empty comes last


def test_tensors_that_tell_the_longest() -> None:
    batch = batch_of(
        [3, 5, 2], max_length_q=torch.tensor(5), cu_seq_lens_q=torch.tensor([0, 3, 8, 10])
    )
    first, second = cut_documents(batch, 2)
    assert [piece["max_length_q"].item() for piece in (first, second)] == [3, 5]
    assert second["cu_seq_lens_q"].tolist() == [0, 5, 7]
    (whole,) = cut_documents(batch, 1)
    assert whole.keys() == batch.keys()


def test_what_transformers_collates() -> None:
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    rows = [{"input_ids": list(range(n))} for n in (3, 5, 2)]
    made = cut_documents(collate(rows), 2)
    alone = [collate(rows[:1]), collate(rows[1:])]
    for mine, theirs in zip(made, alone, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"seq_idx"}:  # of which only differences tell
            assert torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(theirs[key])), key
        assert torch.equal(mine["seq_idx"].diff(), theirs["seq_idx"].diff())


def test_own_names() -> None:
    batch = {"x": torch.arange(6), "ends": torch.tensor([0, 2, 6]), "weights": torch.ones(4)}
    made = cut_documents(batch, 2, borders=("ends",), same=("weights",))
    assert [piece["x"].tolist() for piece in made] == [[0, 1], [2, 3, 4, 5]]
    assert [len(piece["weights"]) for piece in made] == [4, 4]


TOKENS = torch.arange(6)[None]
REFUSED: dict[str, tuple[Any, str]] = {
    "tensor": (TOKENS, "cuts a dict of tensors, and the batch is a Tensor"),
    "untold": ({"input_ids": TOKENS}, "nothing tells documents: give 'position_ids', or one of"),
    "rows": ({"position_ids": TOKENS.repeat(2, 1)}, "'position_ids' has 2 rows: a flattened batch"),
    "list": (batch_of([2, 4], cu_seqlens=[0, 2, 6]), "'cu_seqlens' has to be a tensor of whole"),
    "begins": (batch_of([2, 4], cu_seqlens=torch.tensor([2, 6])), "has to grow from 0"),
    "grows": (batch_of([2, 4], cu_seqlens=torch.tensor([0, 2, 2, 6])), "has to grow from 0"),
    "others": (
        batch_of([2, 4], cu_seq_lens_q=torch.tensor([0, 3, 6])),
        "'cu_seqlens' and 'cu_seq_lens_q' tell other documents",
    ),
    "size": (batch_of([2, 4], other=torch.ones(5)), r"'other', of shape \[5\], has neither an el"),
    "short": (batch_of([2, 4], cu_seqlens=torch.tensor([0, 2, 5])), "'input_ids', of shape"),
    "items": (batch_of([2, 4], other=[1, 2]), "'other' is a list: give a tensor"),
    "labels": (batch_of([2, 4], labels=TOKENS), r"'labels' keeps the first token .* shifted=\(\)"),
}


@pytest.mark.parametrize(("batch", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_cut(batch: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        cut_documents(batch, 2)


def test_labels_that_the_model_does_not_move() -> None:
    made = cut_documents(batch_of([2, 4], labels=TOKENS), 2, shifted=())
    assert [piece["labels"].tolist() for piece in made] == [[[0, 1]], [[2, 3, 4, 5]]]


def test_a_bad_number_of_pieces() -> None:
    with pytest.raises(OptionError, match="cut_documents: pieces=0"):
        cut_documents(batch_of([2, 4]), 0)

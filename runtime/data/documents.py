"""Flattened batches, of many documents in one row: cut between documents."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ...compiler.ir.errors import BatchError, OptionError

BORDERS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_seqlen", "max_length_q", "max_length_k")
PLACES = "position_ids"


def cut_documents(
    batch: Mapping[str, Any],
    pieces: int,
    *,
    borders: Collection[str] = BORDERS,
    longest: Collection[str] = LONGEST,
    places: str = PLACES,
    shifted: Collection[str] = ("labels",),
    same: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Cut a flattened batch between documents, for ``compile(cut=...)``.

    Each piece has documents that follow each other, in their order, and about as many tokens as the
    others: its borders are those nearest to an even cut. It has at least one document, unless there
    are fewer documents than pieces: the last pieces then have no tokens.

    Args:
        batch: a dict of tensors. Those with an element for each token, along dim 0 or, after a
            dim 0 of size 1, along dim 1, are cut there; those with one for each document, along
            dim 0, go with the documents. What has no dimensions goes to every piece.
        borders: keys of what has the borders of documents: (documents + 1), from 0 to the number of
            tokens. In pieces they begin with 0 again.
        longest: keys of the length of the longest document, a number or a 0-dim tensor, which is
            that of each piece.
        places: key of the positions of tokens, by which documents are told where there are no
            borders: each begins where a position is not the one before plus 1.
        shifted: keys of labels that the model moves by one token, as transformers' do. The first of
            each document has to be -100 there: it would be told out of another document, which
            a piece does not have. () for models that move none.
        same: keys of what every piece has all of.

    Raises:
        OptionError: ``pieces`` is less than 1.
        BatchError: documents are not told, or in several ways; a tensor has another size; a first
            label is kept.
    """
    if type(pieces) is not int or pieces < 1:
        raise OptionError(f"cut_documents: pieces={pieces!r}: give 1 or more")
    if not isinstance(batch, Mapping):
        kind = type(batch).__name__
        raise BatchError(f"cut_documents cuts a dict of tensors, and the batch is a {kind}")
    ends = _ends(batch, borders, places)
    for key in shifted:
        if isinstance(batch.get(key), torch.Tensor):
            _check_first_labels(key, batch[key].flatten(), ends)
    starts = _cuts(ends, pieces)
    made: list[dict[str, Any]] = [{} for _ in range(pieces)]
    for key, value in batch.items():
        for piece, (first, last) in zip(made, pairwise(starts), strict=True):
            start, end = ends[first], ends[last]
            if key in borders:
                piece[key] = value[first : last + 1] - start
            elif key in longest:
                piece[key] = _longest(value, ends[first : last + 1])
            elif key in same:
                piece[key] = value
            else:
                piece[key] = _part(key, value, (first, last), (start, end), ends)
    return made


def _ends(batch: Mapping[str, Any], borders: Collection[str], places: str) -> list[int]:
    """Where documents end, after a 0."""
    found = {key: _listed(key, batch[key]) for key in borders if key in batch}
    if not found:
        if not isinstance(batch.get(places), torch.Tensor):
            raise BatchError(
                f"cut_documents: nothing tells documents: give {places!r}, or one of "
                f"{', '.join(map(repr, borders)) or 'no borders'}"
            )
        at = batch[places]
        if at.dim() > 1 and at.shape[0] != 1:
            raise BatchError(
                f"cut_documents: {places!r} has {at.shape[0]} rows: a flattened batch has one; "
                "several are cut without cut="
            )
        at = at.flatten()
        begins = (at[1:] != at[:-1] + 1).nonzero().flatten() + 1
        return [0, *begins.tolist(), *([len(at)] if len(at) else [])]
    (key, ends), *others = found.items()
    for other, theirs in others:
        if theirs != ends:
            raise BatchError(f"cut_documents: {key!r} and {other!r} tell other documents")
    if ends[:1] != [0] or any(a >= b for a, b in pairwise(ends)):
        raise BatchError(
            f"cut_documents: {key!r} has to grow from 0 to the number of tokens, by at least 1 for "
            f"each document: {ends[:8]}"
        )
    return ends


def _listed(key: str, value: Any) -> list[int]:
    if not isinstance(value, torch.Tensor) or value.dim() != 1 or value.is_floating_point():
        raise BatchError(f"cut_documents: {key!r} has to be a tensor of whole numbers, of one dim")
    listed: list[int] = value.tolist()
    return listed


def _check_first_labels(key: str, labels: torch.Tensor, ends: Sequence[int]) -> None:
    firsts = labels[torch.tensor(ends[1:-1], dtype=torch.int64, device=labels.device)]
    if bool((firsts != -100).any()):
        raise BatchError(
            f"cut_documents: {key!r} keeps the first token of a document, which a model that moves "
            "labels tells out of the document before it: set it to -100 (as transformers' "
            "DataCollatorWithFlattening does), or give shifted=() if the model moves none"
        )


def _cuts(ends: Sequence[int], pieces: int) -> list[int]:
    """The number of the first document of each piece, and of all."""
    documents, cuts = len(ends) - 1, [0]
    for i in range(1, pieces):
        aim = ends[-1] * i / pieces
        after = bisect_left(ends, aim)
        nearest = min((n for n in (after - 1, after) if n >= 0), key=lambda n: abs(ends[n] - aim))
        least, most = cuts[-1] + 1, documents - (pieces - i)
        cuts.append(min(documents, max(least, min(nearest, most))))
    return [*cuts, documents]


def _longest(value: Any, ends: Sequence[int]) -> Any:
    longest = max((b - a for a, b in pairwise(ends)), default=0)
    return value.new_tensor(longest) if isinstance(value, torch.Tensor) else longest


def _part(
    key: str,
    value: Any,
    documents: tuple[int, int],
    tokens: tuple[int, int],
    ends: Sequence[int],
) -> Any:
    """What a piece has of a value that goes with tokens or documents."""
    if isinstance(value, (list, np.ndarray)):
        raise BatchError(f"cut_documents: {key!r} is a {type(value).__name__}: give a tensor")
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    if value.dim() > 1 and value.shape[0] == 1 and value.shape[1] == ends[-1]:
        return value[:, tokens[0] : tokens[1]]
    if value.shape[0] == ends[-1]:
        return value[tokens[0] : tokens[1]]
    if value.shape[0] == len(ends) - 1:
        return value[documents[0] : documents[1]]
    raise BatchError(
        f"cut_documents: {key!r}, of shape {list(value.shape)}, has neither an element for each of "
        f"{ends[-1]} tokens, in dim 0 or after a dim 0 of 1, nor for each of {len(ends) - 1} "
        "documents: say in same= if every piece is to have all of it"
    )

"""Batches that a callable of the user's cuts (``cut=``), and what is checked of its pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...compiler.capture import batch as batches
from ...compiler.capture.batch import BatchSpec, Leaf, Scales
from ...compiler.ir.errors import BatchError
from ...compiler.tensors.fakes import is_fake

Cut = Callable[[Any, int], Any]
"""(batch, pieces) -> so many batches, or None for some."""


@dataclass(frozen=True)
class Piece:
    """A part of a batch.

    Attributes:
        spec: its scales are what is known of them from all pieces of the batch.
    """

    spec: BatchSpec
    values: tuple[torch.Tensor, ...]


def pieces_of(
    cut: Cut, spec: BatchSpec, values: Sequence[torch.Tensor], count: int
) -> list[Piece | None]:
    """What a callable makes of a batch, in its order; None for pieces without anything.

    Args:
        spec, values: of the batch, which has something.

    Raises:
        BatchError: the callable fails, or returns what cannot be the pieces of the batch.
    """
    if any(map(is_fake, values)) or not values:
        raise BatchError("cut= cuts a batch by its values: give a batch that has some")
    try:
        made = cut(spec.build(values), count)
    except BatchError:
        raise
    except Exception as error:
        raise BatchError(f"cut= raised {type(error).__name__}: {error}") from error
    if not isinstance(made, (list, tuple)) or len(made) != count:
        what = f"{len(made)} of them" if isinstance(made, (list, tuple)) else "no list"
        raise BatchError(
            f"cut= was asked for {count} pieces and returned {what}: return a list with a batch, "
            "or None, for each"
        )
    found = [None if each is None else _piece(i, each, spec) for i, each in enumerate(made)]
    there = [piece for piece in found if piece is not None]
    if not there:
        raise BatchError(f"cut= left nothing of the batch ({spec}) in any piece")
    if len(there) > 1 and all(_sizes(piece.spec) == _sizes(spec) for piece in there):
        raise BatchError(
            f"cut= returned the whole batch ({spec}) {len(there)} times: a piece has a part of it"
        )
    _check_nothing_lost(spec, [piece.spec for piece in there])
    scales = _scales(spec, [piece.spec for piece in there])
    return [piece and replace(piece, spec=replace(piece.spec, scales=scales)) for piece in found]


def _piece(number: int, made: Any, whole: BatchSpec) -> Piece | None:
    """Raises BatchError where it is another kind of batch than the whole."""
    try:
        values, spec = batches.flatten(made, by_rows=False)
    except BatchError as error:
        raise BatchError(f"piece {number} of cut=: {error}") from error
    odd = _difference(spec, whole)
    if odd:
        raise BatchError(
            f"piece {number} of cut= {odd}: pieces are batches like the one that is cut"
        )
    if not spec.rows:
        return None
    return Piece(replace(spec, left_out=whole.left_out), tuple(v.contiguous() for v in values))


def _difference(piece: BatchSpec, whole: BatchSpec) -> str:
    """What makes it another kind of batch; "" if nothing does."""
    mine, theirs = ({leaf.name: leaf for leaf in spec.leaves} for spec in (piece, whole))
    for name in theirs:
        if name not in mine:
            return f"lacks the tensor {name!r}"
    for name, leaf in mine.items():
        if name not in theirs:
            return f"has a tensor {name!r}, which the batch does not have"
        like = theirs[name]
        if (leaf.dtype, len(leaf.shape)) != (like.dtype, len(like.shape)):
            return f"has {leaf}, and the batch {like}"
    if piece.tree != whole.tree or list(mine) != list(theirs):
        return "has another structure than the batch"
    return ""


def _check_nothing_lost(whole: BatchSpec, pieces: Sequence[BatchSpec]) -> None:
    """Raises BatchError where what pieces have of a tensor is less than all of it."""
    for leaf, parts in _by_leaf(whole, pieces):
        for dim, size in enumerate(leaf.shape):
            sizes = [part.shape[dim] for part in parts]
            if any(each != size for each in sizes) and sum(sizes) < size:
                raise BatchError(
                    f"cut= loses a part of {leaf.name!r}: its pieces have {sum(sizes)} of {size} "
                    f"in dimension {dim} ({' + '.join(map(str, sizes))})"
                )


def _by_leaf(whole: BatchSpec, pieces: Sequence[BatchSpec]) -> list[tuple[Leaf, tuple[Leaf, ...]]]:
    parts = zip(*(piece.leaves for piece in pieces), strict=True)
    return list(zip(whole.leaves, parts, strict=True))


def _sizes(spec: BatchSpec) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in spec.leaves]


def _scales(whole: BatchSpec, pieces: Sequence[BatchSpec]) -> Scales:
    """How sizes go with what is in a piece. Of borders there is one more than of what they are
    between, so that each piece has one that the batch has not."""

    def scale(leaf: Leaf, dim: int, sizes: Sequence[int]) -> int | None:
        if all(size == leaf.shape[dim] for size in sizes):
            return None
        borders = len(leaf.shape) == 1 and not leaf.dtype.is_floating_point
        return int(borders and len(sizes) > 1 and sum(sizes) == leaf.shape[dim] + len(sizes) - 1)

    return tuple(
        tuple(
            scale(leaf, dim, [part.shape[dim] for part in parts]) for dim in range(len(leaf.shape))
        )
        for leaf, parts in _by_leaf(whole, pieces)
    )


def merged(one: Scales, other: Scales) -> Scales:
    """What two batches have shown: what is not the same in all pieces of either; a border is one in
    both."""

    def both(a: int | None, b: int | None) -> int | None:
        return b if a is None else a if b is None else min(a, b)

    return tuple(
        tuple(both(*pair) for pair in zip(mine, theirs, strict=True))
        for mine, theirs in zip(one, other, strict=True)
    )


def share_of(cut: Cut, batch: Any, shards: int, shard: int) -> Any:
    """What one of several processes gets of a batch; without elements where nothing is left.

    Raises:
        BatchError: as `pieces_of` does.
    """
    values, spec = batches.flatten(batch, by_rows=False)
    piece = pieces_of(cut, spec, values, shards)[shard]
    return emptied(batch) if piece is None else piece.spec.build(piece.values)


def emptied(batch: Any) -> Any:
    """A batch like this one, without elements."""
    values, spec = batches.flatten(batch, by_rows=False)
    return spec.with_rows(0).build([value[:0] if value.dim() else value for value in values])

"""The microbatches of all replicas, where a callable of the user's makes them (``cut=``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from ...compiler.capture.batch import BatchSpec, Scales
from ...compiler.ir.errors import BatchError
from ...compiler.options.microbatches import pieces_per_replica
from ...compiler.options.options import CompileOptions
from ..exchange.agreement import Agreed
from ..exchange.alike import Pieces
from .cutting import Piece, merged, pieces_of

Leaves = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Parts:
    """Into what a batch is cut.

    Attributes:
        sizes: per replica, the rows of each microbatch.
        likes: per replica and microbatch, the spec of a row of it, or of what stands in for it.
    """

    sizes: Sequence[Sequence[int]]
    likes: Sequence[Sequence[BatchSpec]]

    @property
    def shapes(self) -> list[BatchSpec]:
        """Those that differ; where a callable cuts, the largest first."""
        found = list(dict.fromkeys(like for each in self.likes for like in each))
        return found if found[0].scales is None else sorted(found, key=lambda s: -s.nbytes)


class Cutter:
    """Cuts batches, and remembers in which dimensions pieces of them differ.

    Args:
        replicas: how many the batches of this process are for.
    """

    def __init__(self, options: CompileOptions, replicas: int):
        assert options.cut is not None
        self._cut, self._replicas = options.cut, replicas
        self._count = pieces_per_replica(options)
        self._known: dict[BatchSpec, Scales] = {}  # by what is alike in batches of all sizes

    def cut(
        self, whole: BatchSpec | None, values: Sequence[torch.Tensor]
    ) -> tuple[list[Pieces], list[torch.Tensor], BatchError | None]:
        """The microbatches of the replicas here, the leaves of one after the other, and why there
        are none where the callable fails."""
        if whole is None:
            return [], [], None
        try:
            shares = self._shares(whole, values)
        except BatchError as error:
            return [], [], error
        cuts = [tuple(piece.spec if piece else None for piece in share) for share in shares]
        leaves = [leaf for share in shares for piece in share if piece for leaf in piece.values]
        return cuts, leaves, None

    def _shares(self, whole: BatchSpec, values: Sequence[torch.Tensor]) -> list[list[Piece | None]]:
        batch = Piece(whole, tuple(values)) if whole.rows else None
        shares = self._divided(batch, self._replicas)
        made = [self._divided(share, self._count) for share in shares]
        seen = [piece.spec for share in (shares, *made) for piece in share if piece]
        kind = _kind(whole)
        if batch and kind not in self._known and not any(spec.varies for spec in seen):
            seen += [piece.spec for piece in self._divided(batch, 2) if piece]  # to learn it
        scales = reduce(merged, (spec.scales for spec in seen if spec.scales), whole.scales or ())
        return [[piece and _with(piece, scales) for piece in share] for share in made]

    def _divided(self, piece: Piece | None, count: int) -> list[Piece | None]:
        """In so many pieces, of which those without anything come last."""
        if piece is None or count == 1:
            return [piece] + [None] * (count - 1)
        found = pieces_of(self._cut, piece.spec, piece.values, count)
        return sorted(found, key=lambda each: each is None)

    def parts(self, agreed: Agreed) -> Parts:
        """Of all replicas.

        Raises:
            BatchError: there is nothing in them.
        """
        shares = [[piece for piece in pieces if piece] for pieces in agreed.pieces]
        there = [piece for pieces in shares for piece in pieces]
        if not there:
            raise BatchError("the batch has nothing in it: leave it out")
        kind = _kind(there[0])
        known = reduce(merged, (piece.scales for piece in there if piece.scales))
        known = merged(known, self._known.get(kind, known))
        if any(fixed is not None for each in known for fixed in each):
            self._known[kind] = known
        first = next(filter(None, shares)) if self._replicas == 1 else there
        spares = [
            min(pieces if pieces and self._replicas == 1 else first, key=lambda piece: piece.nbytes)
            for pieces in shares
        ]
        likes = [
            [replace(piece or spare, scales=known) for piece in pieces]
            for pieces, spare in zip(agreed.pieces, spares, strict=True)
        ]
        return Parts([[int(piece is not None) for piece in each] for each in agreed.pieces], likes)

    def smallest(self, values: Sequence[torch.Tensor], count: int) -> Leaves:
        """The leaves of the smallest of so many microbatches; none of none."""
        found = dealt(values, [1] * count)
        return tuple(min(found, key=lambda each: sum(v.nbytes for v in each), default=()))


def dealt(values: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[Sequence[torch.Tensor]]:
    """The leaves of each microbatch; none of one without rows."""
    per = len(values) // max(1, sum(sizes))
    starts = [per * sum(sizes[:i]) for i in range(len(sizes))]
    return [values[start : start + per * n] for start, n in zip(starts, sizes, strict=True)]


def _kind(spec: BatchSpec) -> BatchSpec:
    return replace(spec.without_sizes(), constants=(), scales=None)


def _with(piece: Piece, scales: Scales) -> Piece:
    return replace(piece, spec=replace(piece.spec, scales=scales))

"""What compressed gradients take: bytes that are sent, bytes that are held, and work.

The figures of `bf16`, `int8` and `powersgd` follow from shapes alone; how much `adacomp` sends
depends on the gradients, and is foretold by `BIN_WORDS`, an estimate. Of tables of embeddings the
most is told that rows can take: every lookup of a row of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .methods import Method

Shape = tuple[int, ...]

CHUNK = 256
"""How many numbers have one scale, and go to one owner. Parameters begin with a new chunk, so that
what is made of one does not depend on which others a stage has."""

FLOAT, FLAG, COUNT, WORD, NUMBER = 4, 1, 8, 2, 4  # bytes
BIN_WORDS = 10.0
"""How many words `adacomp` is taken to send of a bin of 512: about what a GPT-2 sent in its first
steps (docs/slow_links.md). Of other bins it is taken to grow with the root of their size."""

ROW_BYTES = {"bf16": 2 * CHUNK, "int8": CHUNK + FLOAT}
"""Of a chunk on its way."""


@dataclass(frozen=True)
class Needs:
    """Of the gradients of one rank, once per step.

    Attributes:
        sent_bytes: what this replica gives the others.
        messages: collectives, which each take the link's latency.
        residue_bytes: what is held for later steps.
        extra_bytes: what is held for a moment.
        moved_bytes, flops: what compressing and decompressing reads and writes, and multiplies.
    """

    sent_bytes: int
    messages: int
    residue_bytes: int
    extra_bytes: int
    moved_bytes: int
    flops: int = 0

    def __add__(self, other: Needs) -> Needs:
        """Of one exchange after the other."""
        both = {name: mine + getattr(other, name) for name, mine in vars(self).items()}
        return Needs(**both | {"extra_bytes": max(self.extra_bytes, other.extra_bytes)})


NOTHING = Needs(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Table:
    """The gradient of a table of embeddings.

    Attributes:
        bucket_bytes: of the memory that it lies in, whose length the replicas divide.
        lookups: by a replica, per step.
    """

    rows: int
    row_bytes: int
    bucket_bytes: int
    lookups: int

    @property
    def touched(self) -> int:
        """Rows that a replica looks up at most."""
        return min(self.rows, self.lookups)


def rows_pay(most: int, row_bytes: int, bucket_bytes: int, dp: int) -> bool:
    """Whether rows travel by themselves: whether the replica that sends most sends less so.

    Args:
        most: rows of that replica.
    """
    return most * (row_bytes + NUMBER) * dp < 2 * bucket_bytes


def whole_bytes(bucket_bytes: int, dp: int) -> int:
    """What a replica gives the others of a bucket whose mean all take."""
    return 2 * bucket_bytes * (dp - 1) // dp


def rows_need(tables: Sequence[Table], dp: int) -> Needs:
    """What the exchange of touched rows takes at most."""
    if not tables:
        return NOTHING
    sent, extra = COUNT * len(tables) * (dp - 1), 0
    for table in tables:
        given = table.touched * (table.row_bytes + NUMBER)
        most = whole_bytes(table.bucket_bytes, dp)
        sent += min(given * (dp - 1), most)
        touched_by_all = min(table.rows, table.touched * dp)
        extra += dp * given + 2 * touched_by_all * table.row_bytes
    whole = sum(table.rows * table.row_bytes for table in tables)
    return Needs(sent, 2, 0, extra, whole + 4 * extra)


def chunks(numel: int, width: int = CHUNK) -> int:
    return -(-numel // width)


def owned_chunks(numel: int, dp: int, replica: int) -> int:
    """Of a parameter's chunks those whose means a replica makes: every ``dp``-th."""
    return len(range(replica, chunks(numel), dp))


def low_rank(shape: Shape, rank: int) -> tuple[int, int, int] | None:
    """(rows, columns, rank) of a parameter that `powersgd` takes as a matrix; None for one that is
    none, or would not be smaller."""
    if len(shape) < 2 or 0 in shape:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    rank = min(rank, rows, columns)
    return (rows, columns, rank) if rank * (rows + columns) < rows * columns else None


def needs(method: Method, shapes: Sequence[Shape], dp: int, replica: int = 0) -> Needs:
    """What a method takes for parameters of these shapes."""
    if method.name == "powersgd":
        return _powersgd(method.number, shapes, dp)
    if method.name == "adacomp":
        return _adacomp(method.number, shapes, dp)
    return _rounded(ROW_BYTES[method.name], shapes, dp, replica)


def _rounded(row_bytes: int, shapes: Sequence[Shape], dp: int, replica: int) -> Needs:
    numels = [math.prod(shape) for shape in shapes]
    owned = [sum(owned_chunks(n, dp, r) for n in numels) for r in range(dp)]
    mine, rest = owned[replica], sum(owned) - owned[replica]
    whole = sum(owned) * CHUNK * FLOAT
    sent = (rest + mine * (dp - 1)) * row_bytes + FLAG * (dp - 1)
    payload = (2 * sum(owned) + mine * dp) * row_bytes
    return Needs(sent, 3, whole, whole + payload, 10 * whole)


def _powersgd(rank: int, shapes: Sequence[Shape], dp: int) -> Needs:
    found = [low_rank(shape, rank) for shape in shapes]
    matrices = [each for each in found if each is not None]
    rest = [math.prod(s) for s, each in zip(shapes, found, strict=True) if each is None]
    left = sum(rows * k for rows, _, k in matrices) + sum(rest)
    right = sum(columns * k for _, columns, k in matrices)
    both = [chunks(count, dp) * dp * FLOAT for count in (left, right)]
    whole = sum(rows * columns for rows, columns, _ in matrices) * FLOAT
    largest = max((rows * columns for rows, columns, _ in matrices), default=0) * FLOAT
    return Needs(
        sum(2 * each * (dp - 1) // dp for each in both) + FLAG * (dp - 1),
        5,
        whole + right * FLOAT,
        2 * sum(both) + 2 * largest,
        8 * whole,
        sum(6 * rows * columns * k for rows, columns, k in matrices),
    )


def _adacomp(width: int, shapes: Sequence[Shape], dp: int) -> Needs:
    numels = [math.prod(shape) for shape in shapes]
    bins = sum(chunks(n, width) for n in numels)
    words = round(bins * BIN_WORDS * math.sqrt(width / 512))
    payload = words * WORD + len(shapes) * FLOAT
    whole = bins * width * FLOAT
    largest = max(numels, default=0) * FLOAT
    sent = (payload + FLAG + COUNT) * (dp - 1)
    return Needs(sent, 3, whole, whole + payload * dp + 4 * largest, 16 * whole)

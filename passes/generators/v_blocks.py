"""V-Half and V-Min (Qi et al., "Pipeline Parallelism with Controllable Memory", NeurIPS 2024).

Two stages per rank in a V: stages s and 2 p − 1 − s. What one microbatch does is a building block,
repeated every 6 units of time, which F, B and W of two stages take. How long a rank holds the
microbatch follows from the offsets: how much later than on a rank something runs on the next one,
which are those of F down the V, F up, B down and B up. A rank waits for the others longest with its
one stage where it does shortest with its other one, so all ranks hold about as much. The smaller
the offsets, the less:

=======  ===========================  =========================
kind     at most, of microbatches     bubble if F = B = W, m large
=======  ===========================  =========================
1F1B     p                            p / m
V-Half   ⌊(p + 2) / 2⌋                p / 2 m
V-Min    ⌊(p + 4) / 3⌋                2 p / 3 m
=======  ===========================  =========================

These are the paper's figures. The longest rank of what is made here takes at most 6 m + 3 p − 4 and
6 m + 4 p − 4 of these units, where m ≥ p ≥ 4, and the paper's 6 m + 3 p and 6 m + 4 p. V-Min with
p = 4, m = 4, where a capital is the first stage of a rank:

    rank 0   F0 F1                f0 b0 F2 w0       f1 b1 B0 W0 F3 w1 f2 b2 B1 W1 w2    f3 b3 …
    rank 1      F0             f0 F1    b0 w0    f1 F2 B0 b1 W0 w1 f2 F3 B1 b2 W1 w2 f3    B2 …
    rank 2         F0       f0       F1    b0 f1 w0 B0 F2 W0 b1 f2 w1 B1 F3 W1 b2 f3 w2 B2 W2 …
    rank 3            F0 f0             F1 f1 b0 B0 W0 w0 F2 f2 b1 B1 W1 w1 F3 f3 b2 B2 W2 w2 …

Blocks are squeezed: F and B keep their order and run as early as they can; W fills what is left
(`passes.sequencing.refill`). Where seconds are known, other orders compete under the same limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from ...compiler.ir.actions import Schedule
from ..sequencing.problem import B, F, Order
from ..sequencing.search import best_order
from .sequenced import effort_of, problem_of, schedule_of
from .shape import PipelineShape

Offsets = tuple[int, int, int, int]
MIN: tuple[Offsets, ...] = ((1, 1, 1, 1),)
HALF: tuple[Offsets, ...] = ((1, 2, 1, 2), (2, 1, 2, 1), (1, 2, 2, 1))
PERIOD = 6
TURNS = range(1, PERIOD + 1)


def v_half(shape: PipelineShape) -> Schedule:
    """Half of the memory of 1F1B, or less where the rank's limit is.

    Raises:
        OptionError: a rank's limit is less than one microbatch takes.
    """
    return _within(shape, (shape.ranks + 2) // 2, HALF + MIN)


def v_min(shape: PipelineShape) -> Schedule:
    """A third of the memory of 1F1B, or less where the rank's limit is.

    Raises:
        OptionError: a rank's limit is less than one microbatch takes.
    """
    return _within(shape, (shape.ranks + 4) // 3, MIN + HALF)


def _within(shape: PipelineShape, microbatches: int, offsets: Sequence[Offsets]) -> Schedule:
    problem = problem_of(shape, microbatches)
    orders = block_orders(shape, offsets)
    return schedule_of(best_order(problem, orders=orders, effort=effort_of(shape)))


def block_orders(shape: PipelineShape, offsets: Sequence[Offsets]) -> Iterator[Order]:
    """F and B of every block with these offsets; of each, those first that turn soonest."""
    few: set[Order] = set()
    for each in offsets:
        for turns in sorted(product(TURNS, TURNS, TURNS), key=sum):
            block = _block(shape.ranks, each, turns)
            if not _is_free(block):
                continue
            short = _repeated(block, PERIOD)
            if short not in few:
                few.add(short)
                yield _repeated(block, shape.microbatches)


Block = tuple[tuple[tuple[int, int, int], ...], ...]
"""Per rank, (when, kind, stage) of one microbatch."""


def _block(ranks: int, offsets: Offsets, turns: tuple[int, int, int]) -> Block:
    """F down and up the V, B down and up; ``turns`` are the times at its ends."""
    down, up = range(ranks), range(ranks)[::-1]
    now = 0
    rows: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    legs = ((F, down), (F, up), (B, down), (B, up))
    for (kind, way), offset, turn in zip(legs, offsets, (*turns, 0), strict=True):
        for rank in way:
            first = (way is down) == (kind == F)
            rows[rank].append((now, kind, rank if first else 2 * ranks - 1 - rank))
            now += offset
        now += turn - offset
    return tuple(map(tuple, rows))


def _is_free(block: Block) -> bool:
    """Whether no rank is to do two things at a time when it is repeated."""
    return all(len({when % PERIOD for when, _, _ in row}) == len(row) for row in block)


def _repeated(block: Block, microbatches: int) -> Order:
    return tuple(
        tuple(
            (kind, stage, i)
            for _, kind, stage, i in sorted(
                (when + PERIOD * i, kind, stage, i)
                for i in range(microbatches)
                for when, kind, stage in row
            )
        )
        for row in block
    )

"""ZB-V (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 6).

Two stages per rank in a V: stages s and 2 p − 1 − s, so that the first rank has the loss, and B can
begin where F did. With no more memory than 1F1B, nothing waits if F, B and W take as long and
messages nothing. With p = 3 ranks and m = 6 microbatches, where a capital is the first stage of a
rank:

    rank 0   F0 F1 F2 F3 F4 f0 b0 w0 f1 b1 w1 f2 b2 w2 F5 B0 W0 f3 b3 w3 B1 W1 f4 b4 w4 B2 W2 f5 …
    rank 1      F0 F1 F2 f0 F3 f1 b0 w0 f2 b1 w1 F4 B0 W0 f3 b2 w2 F5 B1 W1 f4 b3 w3 B2 W2 f5 b4 …
    rank 2         F0 f0 F1 f1 F2 f2 b0 w0 F3 B0 W0 f3 b1 w1 F4 B1 W1 f4 b2 w2 F5 B2 W2 f5 b3 B3 …

Where F, B and W take otherwise, W are moved, and other orders compete (`passes.sequencing`).
"""

from __future__ import annotations

from itertools import chain

from ...compiler.ir.actions import Schedule
from ..sequencing.problem import B, F, Order, Step
from ..sequencing.search import best_order
from .sequenced import effort_of, problem_of, schedule_of
from .shape import PipelineShape
from .v_blocks import HALF, Offsets, block_orders

WIDE: tuple[Offsets, ...] = ((3, 3, 3, 3), (2, 3, 3, 2))


def zb_v(shape: PipelineShape) -> Schedule:
    """The compute actions of the best schedule found with the memory of 1F1B.

    A rank holds as much as p microbatches stash on both its stages, or less where its limit is.

    Raises:
        OptionError: a rank's limit is less than one microbatch takes.
    """
    problem = problem_of(shape, shape.ranks)
    orders = chain([_in_waves(shape)], block_orders(shape, WIDE + HALF))
    return schedule_of(best_order(problem, orders=orders, effort=effort_of(shape)))


def _in_waves(shape: PipelineShape) -> Order:
    """F and B as in the picture."""
    p = shape.ranks
    return tuple(_wave(r, 2 * p - 1 - r, p - r, shape.microbatches) for r in range(p))


def _wave(first: int, second: int, left: int, microbatches: int) -> tuple[Step, ...]:
    """Of a rank with two stages and ``left`` − 1 ranks behind it."""
    wanted = [(F, first)] * (2 * left - 1)
    wanted += [(F, second), (F, first)] * first
    wanted += [(F, second), (B, second)] * left
    wanted += [(F, first), (B, first), (F, second), (B, second)] * microbatches
    counts: dict[tuple[int, int], int] = {}
    steps: list[Step] = []
    for kind, stage in wanted:
        number = counts.setdefault((kind, stage), 0)
        if number < microbatches:
            counts[kind, stage] += 1
            steps.append((kind, stage, number))
    return tuple(steps)

"""Interleaved 1F1B (Narayanan et al., SC 2021): 1F1B over several stages per rank.

A rank runs its stages in turn, each for a round of microbatches: p of them, or some more where p
does not divide m, in rounds as equal as can be. With p = 2 ranks of 2 stages and m = 4
microbatches, where a capital is the first stage of a rank and
a backward takes as long as two forwards:

    rank 0   F0 F1 f0 f1 F2    b0    F3 b1    f2 B0    f3 B1       b2       b3    B2    B3
    rank 1      F0 F1 f0 b0    f1 b1    F2 B0    F3 B1    f2 b2    f3 b3    B2    B3

The warm-up of rank r is 2 (p − r − 1) forwards for the way through the ranks, and one round of each
stage but the last. So a bubble is as long as a stage is, 1/v of what it is with one stage per rank,
for which this is 1F1B; in turn more messages are sent, and more microbatches are in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ...compiler.ir.actions import Action, Kind, Schedule
from .one_f_one_b import one_f_one_b
from .shape import PipelineShape, with_weights


def interleaved(shape: PipelineShape) -> Schedule:
    """The compute actions of interleaved 1F1B; any number of microbatches."""
    if shape.virtual == 1:
        return one_f_one_b(shape)
    rounds = _rounds(shape.ranks, shape.microbatches)
    rows = []
    for rank, stages in enumerate(shape.placement):
        forwards = _in_turn(Kind.F, stages, rounds)
        backwards = _in_turn(Kind.B, stages[::-1], rounds)
        way = 2 * (shape.ranks - rank - 1)
        warm_up = min(way + (shape.virtual - 1) * len(rounds[0]), len(forwards))
        row = forwards[:warm_up]
        for i, backward in enumerate(backwards):
            row += [*forwards[warm_up + i : warm_up + i + 1], backward]
        rows.append(tuple(row))
    return with_weights(tuple(rows), shape.splits)


def _rounds(ranks: int, microbatches: int) -> list[range]:
    """As many rounds of at least p microbatches as there can be; longer ones first.

    In a shorter one the first microbatch would come back to rank 0 too late, and with the next
    round begun meanwhile, ranks would wait for each other in a circle.
    """
    count = max(1, microbatches // ranks)
    size, longer = divmod(microbatches, count)
    starts = [i * size + min(i, longer) for i in range(count + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def _in_turn(kind: Kind, stages: Sequence[int], rounds: Sequence[range]) -> list[Action]:
    return [Action(s, kind, i) for batch in rounds for s in stages for i in batch]

"""The automatic schedule of Qi et al., "Zero Bubble Pipeline Parallelism" (ICLR 2024, section 3).

A search over the seconds of F, B, W and messages of the stages at hand, under a limit in bytes
(`passes.sequencing`). Stages may differ, and a rank may hold several. With p = 3 ranks of one
stage, m = 6 microbatches, F = B = W and room for 2 p − 1 = 5 of them, nothing waits once it has
begun:

    rank 0   F0 F1 F2 F3 F4 B0 W0 F5 B1 W1 B2 W2 B3 W3 B4 W4 B5 W5
    rank 1      F0 F1 F2 B0 F3 B1 F4 B2 W0 F5 B3 W1 B4 W2 B5 W3 W4 W5
    rank 2         F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 W0 F5 B5 W1 W2 W3 W4 W5

With room for p = 3 it is like ZB-H1. It is never slower than 1F1B, ZB-H1, ZB-H2 or, with several
stages per rank, interleaved 1F1B, where these fit into the same memory.
"""

from __future__ import annotations

from ...compiler.ir.actions import Schedule
from ..sequencing.search import best_order
from .interleaved import interleaved
from .one_f_one_b import one_f_one_b
from .sequenced import effort_of, order_of, problem_of, schedule_of
from .shape import PipelineShape
from .zb_h1 import zb_h1, zb_h2


def zb(shape: PipelineShape) -> Schedule:
    """The compute actions of the best schedule that is found.

    Where nothing is known of the stages, a rank may hold p microbatches, as in 1F1B.

    Raises:
        OptionError: a rank's limit is less than one microbatch takes.
    """
    problem = problem_of(shape, None if shape.costs else shape.ranks)
    simple = (one_f_one_b, zb_h1, zb_h2) if shape.virtual == 1 else (interleaved,)
    given = [order_of(generate(shape)) for generate in simple]
    return schedule_of(best_order(problem, given, effort=effort_of(shape)))

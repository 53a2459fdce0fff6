"""ZB-H1 (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2.2).

1F1B in which B computes only what other stages wait for. Stage s runs the weight gradients W up to
s microbatches later, so that B reaches the lower stages earlier, and no stage holds more
microbatches than stage 0 does in 1F1B. With S = 3 stages and m = 4 microbatches, where the first
stage, which sends no gradients, has no W:

    stage 0   F0 F1 F2          B0 F3 B1    B2    B3
    stage 1      F0 F1       B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
    stage 2         F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.ir.actions import Action, Kind, Schedule
from .one_f_one_b import one_f_one_b
from .shape import PipelineShape


def zb_h1(shape: PipelineShape) -> Schedule:
    """The compute actions of ZB-H1; a stage without a W runs as in 1F1B."""
    pairs = zip(one_f_one_b(shape), shape.splits, strict=True)
    return tuple(
        _deferring(actions, stage) if split else actions
        for stage, (actions, split) in enumerate(pairs)
    )


def _deferring(actions: Sequence[Action], stage: int) -> tuple[Action, ...]:
    result: list[Action] = []
    waiting: list[Action] = []
    for action in actions:
        result.append(action)
        if action.kind is Kind.B:
            waiting.append(Action(stage, Kind.W, action.microbatch))
            if len(waiting) > stage:
                result.append(waiting.pop(0))
    return (*result, *waiting)

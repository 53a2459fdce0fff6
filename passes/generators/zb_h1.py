"""ZB-H1 and ZB-H2 (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2).

**H1** is 1F1B in which B computes only what other stages wait for. Stage s runs the weight
gradients W up to s microbatches later, so that B reaches the lower stages earlier, and no stage
holds more microbatches than stage 0 does in 1F1B. With S = 3 stages and m = 4 microbatches, where
the first stage, which sends no gradients, has no W:

    stage 0   F0 F1 F2          B0 F3 B1    B2    B3
    stage 1      F0 F1       B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
    stage 2         F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3

**H2** begins with twice as many forwards, so that nothing waits for the first B, and runs W up to
2 s microbatches later. A stage holds 2 S − 1 of them, or all that there are:

    stage 0   F0 F1 F2 F3    B0    B1    B2    B3
    stage 1      F0 F1 F2 B0 F3 B1    B2 W0 B3 W1 W2 W3
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3 W0 W1 W2 W3
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.ir.actions import Action, Kind, Schedule
from .one_f_one_b import alternating
from .shape import PipelineShape


def zb_h1(shape: PipelineShape) -> Schedule:
    """The compute actions of ZB-H1; a stage without a W runs as in 1F1B."""
    return _deferred(shape, 1)


def zb_h2(shape: PipelineShape) -> Schedule:
    """The compute actions of ZB-H2."""
    return _deferred(shape, 2)


def _deferred(shape: PipelineShape, times: int) -> Schedule:
    last, m = shape.n_stages - 1, shape.microbatches
    rows = (alternating(s, times * (last - s), m) for s in range(shape.n_stages))
    return tuple(
        _deferring(actions, s, times * s) if split else actions
        for s, (actions, split) in enumerate(zip(rows, shape.splits, strict=True))
    )


def _deferring(actions: Sequence[Action], stage: int, later: int) -> tuple[Action, ...]:
    result: list[Action] = []
    waiting: list[Action] = []
    for action in actions:
        result.append(action)
        if action.kind is Kind.B:
            waiting.append(Action(stage, Kind.W, action.microbatch))
            if len(waiting) > later:
                result.append(waiting.pop(0))
    return (*result, *waiting)

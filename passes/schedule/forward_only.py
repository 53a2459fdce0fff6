"""Evaluation: forwards alone.

With S = 3 stages and m = 4 microbatches:

    stage 0   F0 F1 F2 F3
    stage 1      F0 F1 F2 F3
    stage 2         F0 F1 F2 F3
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.ir.actions import Action, Kind, Schedule
from ..generators.shape import PipelineShape


def forward_only(shape: PipelineShape) -> Schedule:
    """Evaluation: every stage runs its forwards in order.

    A rank with v stages starts a microbatch every v forwards: F of microbatch i on stage s comes by
    v · i + s, which grows with both, so that nothing waits for what comes later.
    """

    def row(stages: Sequence[int]) -> tuple[Action, ...]:
        pairs = ((shape.virtual * i + s, i, s) for s in stages for i in range(shape.microbatches))
        return tuple(Action(s, Kind.F, i) for _, i, s in sorted(pairs))

    return tuple(map(row, shape.placement))

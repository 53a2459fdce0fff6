"""GPipe (Huang et al., NeurIPS 2019): all forwards, then all backwards.

With p = 3 ranks of one stage and m = 3 microbatches, where a backward takes as long as two
forwards:

    rank 0   F0 F1 F2                   B0    B1    B2
    rank 1      F0 F1 F2          B0    B1    B2
    rank 2         F0 F1 F2 B0    B1    B2

With several stages per rank it is breadth-first (Lamy-Poirier, MLSys 2023): a rank runs a stage for
all microbatches before it turns to its next one. A capital is the first stage of a rank:

    rank 0   F0 F1 F2 f0 f1 f2                   b0    b1    b2    B0    B1    B2
    rank 1      F0 F1 F2 f0 f1 f2          b0    b1    b2    B0    B1    B2
    rank 2         F0 F1 F2 f0 f1 f2 b0    b1    b2    B0    B1    B2

Every stage holds all microbatches. A stage's weight gradients, where they are apart, follow its
backwards one by one.
"""

from __future__ import annotations

from ...compiler.ir.actions import Action, Kind, Schedule
from .shape import PipelineShape, with_weights


def gpipe(shape: PipelineShape) -> Schedule:
    """The compute actions of GPipe, breadth-first."""
    count = range(shape.microbatches)
    rows = tuple(
        (
            *(Action(s, Kind.F, i) for s in stages for i in count),
            *(Action(s, Kind.B, i) for s in reversed(stages) for i in count),
        )
        for stages in shape.placement
    )
    return with_weights(rows, shape.splits)

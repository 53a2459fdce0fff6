"""1F1B (Narayanan et al., SC 2021): few microbatches in flight, backward as early as possible.

With S = 3 stages and m = 4 microbatches:

    stage 0   F0 F1 F2          B0 F3 B1    B2    B3
    stage 1      F0 F1       B0 F2 B1 F3 B2    B3
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3
              └ warm-up ┘ └── steady ──┘ └ cool-down ┘

Stage s holds at most min(S − s, m) microbatches. Its weight gradients, where they are apart,
follow its backwards one by one.
"""

from __future__ import annotations

from ...compiler.ir.actions import Action, Kind, Schedule
from .shape import PipelineShape, with_weights


def one_f_one_b(shape: PipelineShape) -> Schedule:
    """The compute actions of 1F1B; any number of microbatches, fewer than stages too."""
    last = shape.n_stages - 1
    rows = tuple(alternating(s, last - s, shape.microbatches) for s in range(shape.n_stages))
    return with_weights(rows, shape.splits)


def alternating(stage: int, warm_up: int, microbatches: int) -> tuple[Action, ...]:
    """Forwards of the warm-up, and then a forward before every backward while there are any."""
    warm_up = min(warm_up, microbatches)
    actions = [Action(stage, Kind.F, i) for i in range(warm_up)]
    for i in range(microbatches):
        if warm_up + i < microbatches:
            actions.append(Action(stage, Kind.F, warm_up + i))
        actions.append(Action(stage, Kind.B, i))
    return tuple(actions)

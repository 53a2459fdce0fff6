"""1F1B (Narayanan et al., SC 2021): few microbatches in flight, backward as early as possible.

With S = 3 stages and m = 4 microbatches:

    stage 0   F0 F1 F2          B0 F3 B1    B2    B3
    stage 1      F0 F1       B0 F2 B1 F3 B2    B3
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3
              └ warm-up ┘ └── steady ──┘ └ cool-down ┘

Stage s holds at most min(S − s, m) microbatches.
"""

from __future__ import annotations

from ...compiler.ir.actions import Action, Kind, Schedule
from .shape import PipelineShape


def one_f_one_b(shape: PipelineShape) -> Schedule:
    """The compute actions of 1F1B; any number of microbatches, fewer than stages too."""
    n_stages = shape.n_stages
    return tuple(_stage(s, n_stages, shape.microbatches) for s in range(n_stages))


def _stage(stage: int, n_stages: int, microbatches: int) -> tuple[Action, ...]:
    warm_up = min(n_stages - stage - 1, microbatches)
    actions = [Action(stage, Kind.F, i) for i in range(warm_up)]
    for i in range(microbatches):
        if warm_up + i < microbatches:
            actions.append(Action(stage, Kind.F, warm_up + i))
        actions.append(Action(stage, Kind.B, i))
    return tuple(actions)

"""Evaluation: forwards alone.

With S = 3 stages and m = 4 microbatches:

    stage 0   F0 F1 F2 F3
    stage 1      F0 F1 F2 F3
    stage 2         F0 F1 F2 F3
"""

from __future__ import annotations

from ...compiler.ir.actions import Action, Kind, Schedule


def forward_only(n_stages: int, microbatches: int) -> Schedule:
    """Evaluation: every stage runs its forwards in order."""
    return tuple(tuple(Action(s, Kind.F, i) for i in range(microbatches)) for s in range(n_stages))

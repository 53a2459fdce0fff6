"""1F1B (Narayanan et al., SC 2021): few microbatches in flight, backward as early as possible.

With S = 3 stages and m = 4 microbatches:

    stage 0   F0 F1 F2          B0 F3 B1    B2    B3
    stage 1      F0 F1       B0 F2 B1 F3 B2    B3
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3
              └ warm-up ┘ └── steady ──┘ └ cool-down ┘

Stage s holds at most min(S − s, m) microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...compiler.ir.actions import Action, Kind, Schedule


def one_f_one_b(n_stages: int, microbatches: int) -> Schedule:
    """The compute actions of 1F1B; any number of microbatches, fewer than stages too."""
    return tuple(_stage(s, n_stages, microbatches) for s in range(n_stages))


def zb_h1(n_stages: int, microbatches: int, splits: Sequence[bool]) -> Schedule:
    """ZB-H1 (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 2.2).

    1F1B in which B computes only what other stages wait for. Stage s runs the weight gradients W
    up to s microbatches later, so that B reaches the lower stages earlier, and no stage holds
    more microbatches than stage 0 does in 1F1B.

    Args:
        splits: whether a stage has a W; one without runs as in 1F1B.
    """
    plain = one_f_one_b(n_stages, microbatches)
    return tuple(
        _deferring(actions, stage) if split else actions
        for stage, (actions, split) in enumerate(zip(plain, splits, strict=True))
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


def forward_only(n_stages: int, microbatches: int) -> Schedule:
    """Evaluation: every stage runs its forwards in order."""
    return tuple(tuple(Action(s, Kind.F, i) for i in range(microbatches)) for s in range(n_stages))


def _stage(stage: int, n_stages: int, microbatches: int) -> tuple[Action, ...]:
    warm_up = min(n_stages - stage - 1, microbatches)
    actions = [Action(stage, Kind.F, i) for i in range(warm_up)]
    for i in range(microbatches):
        if warm_up + i < microbatches:
            actions.append(Action(stage, Kind.F, warm_up + i))
        actions.append(Action(stage, Kind.B, i))
    return tuple(actions)

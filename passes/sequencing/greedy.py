"""A list scheduler: a rank starts the best of what is ready and fits into memory.

After the automatic schedule of Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024: as many F
as memory takes while there is nothing to go back to, then B before F, and W in the gaps or where
memory runs out. How large a gap is taken is what policies differ in, and whether F of several
stages of a rank come as they are ready, or in rounds: what comes early takes memory from what is
needed first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .engine import Engine
from .problem import B, F, Order, Problem, Step

Key = Callable[[int, int], tuple[float, ...]]
"""(stage, microbatch) -> the smaller comes first."""


@dataclass(frozen=True)
class Policy:
    """What to prefer.

    Attributes:
        forward: which F comes first, where several stages of a rank have one.
        backward: the same for B.
        warms: before the first B of a rank, no F starts if a B arrives before this part of it is
            done.
        waits: the same afterwards.
        slack: a W starts in a gap if at most this part of it is left when something arrives.
        round: so many microbatches go through all stages of a rank before the next ones begin,
            whatever is ready; None for no rounds.
    """

    forward: Key
    backward: Key
    warms: float
    waits: float
    slack: float
    round: int | None = None


def greedy(problem: Problem, policy: Policy) -> Order | None:
    """The order that a policy makes; None if a limit is below the least, or has no room for its
    rounds."""
    engine = Engine(problem)
    return engine.run(_Greedy(engine, policy).pick)


@dataclass(frozen=True)
class _Greedy:
    engine: Engine
    policy: Policy

    def pick(self, rank: int, now: float) -> tuple[Step | None, float]:
        engine, policy, problem = self.engine, self.policy, self.engine.problem
        backward, next_backward = self._best(B, policy.backward, rank, now)
        if backward is not None:
            return backward, 0.0
        forward, next_forward = self._forward(rank, now)
        if forward is not None:
            part = policy.waits if self._has_begun(rank) else policy.warms
            if next_backward >= now + problem.forward_s[forward[1]] * part:
                return forward, 0.0
        weight = engine.weight(rank)
        if weight is not None:
            ends = now + problem.weight_s[weight[1]] * (1 - policy.slack)
            if ends <= min(next_forward, next_backward):
                return weight, 0.0
        return None, next_backward if forward else min(next_forward, next_backward)

    def _forward(self, rank: int, now: float) -> tuple[Step | None, float]:
        """The F that can start, and when the next one can."""
        engine, size = self.engine, self.policy.round
        if size is None:
            return self._best(F, self.policy.forward, rank, now)
        done = engine.done[F]
        turns = [(done[s] // size, s) for s in engine.problem.placement[rank] if done[s] < engine.m]
        if not turns:
            return None, math.inf
        stage = min(turns)[1]
        step = (F, stage, done[stage])
        arrived = engine.arrived[F][stage]
        if done[stage] >= len(arrived) or not engine.fits(rank, step):
            return None, math.inf
        when = arrived[done[stage]]
        return (step, math.inf) if when <= now else (None, when)

    def _best(self, kind: int, key: Key, rank: int, now: float) -> tuple[Step | None, float]:
        """The best one that can start, and when the next one can that is not there yet."""
        engine = self.engine
        best: Step | None = None
        least: tuple[float, ...] = ()
        later = math.inf
        for s in engine.problem.placement[rank]:
            i = engine.done[kind][s]
            arrived = engine.arrived[kind][s]
            if i >= len(arrived):
                continue
            step = (kind, s, i)
            if arrived[i] >= later or not engine.room(rank, step):
                continue
            if arrived[i] > now:
                later = arrived[i]
            elif best is None or key(s, i) < least:
                best, least = step, key(s, i)
        return best, later

    def _has_begun(self, rank: int) -> bool:
        engine = self.engine
        return any(engine.done[B][s] for s in engine.problem.placement[rank])

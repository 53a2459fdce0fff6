"""F and B in a given order, W where nothing else can run."""

from __future__ import annotations

import math

from .engine import Engine
from .problem import Order, Problem, Step, without_weights


def refilled(problem: Problem, order: Order, slack: float = 0.0) -> Order | None:
    """F and B of an order, as early as they can; W in the gaps, and where memory runs out.

    Args:
        slack: a W starts in a gap if at most this part of it is left when something arrives.

    Returns:
        None if F and B do not fit into memory in that order.
    """
    engine = Engine(problem)
    return engine.run(_Refill(engine, without_weights(order), slack).pick)


class _Refill:
    def __init__(self, engine: Engine, order: Order, slack: float) -> None:
        self.engine, self.order, self.slack = engine, order, slack
        self.at = [0] * len(order)

    def pick(self, rank: int, now: float) -> tuple[Step | None, float]:
        engine = self.engine
        weight = engine.weight(rank)
        later = math.inf
        if self.at[rank] < len(self.order[rank]):
            step = self.order[rank][self.at[rank]]
            kind, stage, microbatch = step
            arrived = engine.arrived[kind][stage]
            if not engine.fits(rank, step):
                return weight, math.inf
            if microbatch < len(arrived):
                later = arrived[microbatch]
            if later <= now:
                self.at[rank] += 1
                return step, 0.0
        if weight is not None:
            ends = now + engine.problem.weight_s[weight[1]] * (1 - self.slack)
            if ends <= later:
                return weight, 0.0
        return None, later

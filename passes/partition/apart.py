"""Ranks that hold several stages, as if each stage had a rank of its own.

The solvers of contiguous divisions go from stage to stage, and know nothing of what two stages of
one rank have in common. They get a narrower problem: each stage may use its share of the rank's
memory, and the slowest stage stands for the slowest rank. What fits there fits here.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ...compiler.ir.problem import Problem


def apart(problem: Problem) -> Problem:
    """A problem with one stage per rank: any solution of it that fits into memory fits in this one.

    A stage's share is by its microbatches in flight and by one more, for weights, that all have
    alike.
    """
    if not problem.shares_ranks:
        return problem
    budgets = [math.inf] * problem.n_stages
    for rank, stages in enumerate(problem.placement):
        room = problem.budget_bytes[rank] - problem.reserve_bytes[rank]
        whole = sum(problem.in_flight[s] + 1 for s in stages)
        for s in stages:
            budgets[s] = room * (problem.in_flight[s] + 1) / whole
    return replace(
        problem,
        homes=(),
        together_in_flight=(),
        budget_bytes=tuple(budgets),
        reserve_bytes=(),
        max_weight=problem.max_weight * problem.n_stages / problem.n_ranks,
    )

"""Small problems of the order of a rank's work."""

from __future__ import annotations

import random

from pipecompile.passes.sequencing.problem import Order, Problem
from pipecompile.passes.sequencing.refill import refilled


def drawn(seed: int, ranks: int, virtual: int, microbatches: int, by_end: bool = False) -> Problem:
    """Unequal stages, the first one without W, and limits between tight and ample."""
    chance, n = random.Random(seed), ranks * virtual
    seconds = [tuple(float(chance.randint(6, 14)) for _ in range(n)) for _ in range(3)]
    stash = tuple(float(chance.randint(4, 8)) for _ in range(n))
    carry = tuple(float(chance.randint(1, 9)) for _ in range(n))
    pairs = [(s, s + d) for s in range(n) for d in (1, -1) if 0 <= s + d < n]
    between = tuple((a, b, float(chance.randint(0, 3))) for a, b in pairs)
    limits = tuple(float(chance.choice([10, 16, 24, 99]) * virtual) for _ in range(ranks))
    return Problem(
        tuple(range(ranks)) * virtual,
        microbatches,
        tuple(s > 0 for s in range(n)),
        *seconds,
        stash,
        carry,
        limits,
        between,
        by_end,
    )


def one_by_one(problem: Problem) -> Order:
    """One microbatch after the other."""
    last = problem.n_stages - 1
    rows: list[list[tuple[int, int, int]]] = [[] for _ in problem.placement]
    for i in range(problem.microbatches):
        for kind, stages in ((0, range(last + 1)), (1, range(last, -1, -1))):
            for s in stages:
                rows[problem.homes[s]].append((kind, s, i))
    order = refilled(problem, tuple(map(tuple, rows)))
    assert order is not None
    return order

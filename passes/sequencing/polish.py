"""Improves an order along its critical path.

The rank that takes longest ends when it does because a step waited for the one before it on its
rank, or for a message, whose sender waited again: a path back to the first step. Where a step on it
waited for its rank, what the rank did before may be done later: after the step that waited, or, if
it is a W, at the end. What does not make the order worse is kept, and the path found again.
"""

from __future__ import annotations

from collections.abc import Iterator

from .problem import Order, Problem, Step, W
from .timing import Span, Times, times_of


def polished(problem: Problem, order: Order, tries: int) -> tuple[Span, Order]:
    """The order, or a better one; at most ``tries`` others are looked at."""
    times = times_of(problem, order)
    assert times is not None, "the order that is to be improved waits for itself"
    seen: set[tuple[int, tuple[Step, ...]]] = set()
    while True:
        for rank, steps in _moves(order, times):
            if (rank, steps) in seen:
                continue
            seen.add((rank, steps))
            if not problem.fits_rank(rank, steps):
                continue
            if not tries:
                return times.span, order
            tries -= 1
            changed = (*order[:rank], steps, *order[rank + 1 :])
            found = times_of(problem, changed)
            if found is not None and found.span <= times.span:
                order, times = changed, found
                break
        else:
            return times.span, order


def _moves(order: Order, times: Times) -> Iterator[tuple[int, tuple[Step, ...]]]:
    """What to try: (rank, its steps)."""
    for rank, i in times.critical():
        steps = order[rank]
        if i == 0 or steps[i][0] == W:
            continue
        earlier, late = steps[i - 1], steps[i]
        if earlier[0] == W:
            yield rank, _numbered((*steps[: i - 1], late, earlier, *steps[i + 1 :]))
            yield rank, _numbered((*steps[: i - 1], *steps[i:], earlier))
        elif earlier[:2] != late[:2] and earlier[1:] != late[1:]:
            yield rank, (*steps[: i - 1], late, earlier, *steps[i + 1 :])


def _numbered(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The W of a stage in the order of their microbatches."""
    counts: dict[int, int] = {}
    made = []
    for kind, stage, microbatch in steps:
        number = microbatch
        if kind == W:
            number = counts.get(stage, 0)
            counts[stage] = number + 1
        made.append((kind, stage, number))
    return tuple(made)

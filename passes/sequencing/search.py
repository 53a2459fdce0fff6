"""The best order that is found for a problem: many are made, and the shortest is polished.

What is looked at: orders that are given, as they are and with their W moved into gaps
(`refill`), and those of a family of policies (`greedy`). How many depends on the size alone, so the
same problem always gets the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, product, zip_longest

from ...compiler.ir.errors import OptionError
from .greedy import Key, Policy, greedy
from .polish import polished
from .problem import Order, Problem
from .refill import refilled
from .timing import Span, is_best, times_of

EFFORT = 2_000_000  # steps that are simulated, about
MOST = 400  # orders that are looked at, however short they are
LEAST = 4  # orders that are looked at, however long they are
TRIES = 200  # to make one of them better
POLISHED = 4  # of the best of a family
WAITS = (0.0, 0.5, 0.25)
WARMS = (0.1, 0.5, 0.25, 0.0, 0.75, 1.0)
SLACKS = (0.0, 1.0, 0.5, 0.25, 0.75, 0.9)
PARTS = 4  # of the ranks: sizes of rounds

Preference = tuple[Key, Key, int | None]
"""Of a policy: which F and which B come first, and rounds."""


def best_order(
    problem: Problem,
    given: Sequence[Order] = (),
    orders: Iterable[Order] = (),
    effort: int = EFFORT,
) -> Order:
    """The best order found.

    Args:
        given: orders that the result is at least as good as, if they fit into memory.
        orders: others whose F and B may be worth a try, the best ones first.
        effort: steps to simulate, about.

    Raises:
        OptionError: a rank's limit is less than one microbatch takes.
    """
    check_limits(problem)
    count = min(MOST, max(LEAST, effort // (3 * problem.steps)))
    fitting = (order for order in given if problem.fits(order))
    families = [
        _refills(problem, chain(orders, given)),
        *(
            (greedy(problem, policy) for policy in _ranked(problem, prefers, effort // 3))
            for prefers in _families(problem)
        ),
    ]
    tried = chain(((0, order) for order in fitting), islice(_in_turn(families), count))
    found: list[dict[Order, Span]] = [{} for _ in families]
    for family, order in tried:
        if order is not None and (times := times_of(problem, order)) is not None:
            found[family][order] = times.span
            if is_best(problem, times.span):
                return order
    best = [order for spans in found for order in sorted(spans, key=spans.__getitem__)[:POLISHED]]
    tries = min(TRIES, effort // (3 * problem.steps * len(best)))
    return min((polished(problem, order, tries) for order in best), key=lambda pair: pair[0])[1]


def check_limits(problem: Problem) -> None:
    """Raises OptionError where a rank's limit is less than one microbatch takes."""
    pairs = zip(problem.limit_bytes, problem.least_bytes, strict=True)
    for rank, (limit, least) in enumerate(pairs):
        if limit < least:
            raise OptionError(
                f"rank {rank} may hold {limit:,.0f} bytes for its microbatches, and one of them "
                f"takes {least:,.0f}: raise memory=, or use more microbatches"
            )


def _in_turn(families: Sequence[Iterator[Order | None]]) -> Iterator[tuple[int, Order | None]]:
    """One of each, with the number of its family."""
    for batch in zip_longest(*families):
        yield from enumerate(batch)


def _refills(problem: Problem, orders: Iterable[Order]) -> Iterator[Order | None]:
    kept = []
    for order in orders:
        kept.append(order)
        yield refilled(problem, order)
    for slack in SLACKS[1:3]:
        yield from (refilled(problem, order, slack) for order in kept)


def _ranked(problem: Problem, prefers: Sequence[Preference], effort: int) -> Iterator[Policy]:
    """The policies; where there are many microbatches, first those that are good with fewer."""
    few = replace(problem, microbatches=min(problem.microbatches, 3 * len(problem.placement)))
    if few == problem:
        return _policies(prefers)
    spans = []
    for policy in islice(_policies(prefers), max(LEAST, effort // few.steps)):
        order = greedy(few, policy)
        if order is not None and (times := times_of(few, order)) is not None:
            spans.append((times.span, policy))
    return iter([policy for _, policy in sorted(spans, key=lambda pair: pair[0])])


def _policies(prefers: Sequence[Preference]) -> Iterator[Policy]:
    for slack, waits, warms in product(SLACKS, WAITS, WARMS):
        for forward, backward, size in prefers:
            yield Policy(forward, backward, warms, waits, slack, size)


def _families(problem: Problem) -> list[list[Preference]]:
    """What policies prefer; of each family the best orders are polished, as what can be made of
    one does not show before."""
    if len(problem.placement) == problem.n_stages:
        return [[(_deep, _deep, None)]]
    forward, backward = _turns(problem)
    free: list[Preference] = [(a, b, None) for a, b in product((_deep, forward), (_deep, backward))]
    return [free, [(_deep, _deep, size) for size in _rounds(problem)]]


def _rounds(problem: Problem) -> list[int]:
    """Sizes of rounds: as many microbatches as ranks keep all of them busy; fewer take less."""
    ranks = len(problem.placement)
    return sorted({-(-ranks * part // PARTS) for part in range(1, PARTS + 1)}, reverse=True)


def _deep(stage: int, microbatch: int) -> tuple[float, ...]:
    """The stages closest to the loss first."""
    return -stage, microbatch


def _turns(problem: Problem) -> tuple[Key, Key]:
    """Rounds of p microbatches through the stages of a rank: there with F, back with B."""
    ranks = len(problem.placement)
    return (
        lambda stage, i: (i // ranks, stage, i),
        lambda stage, i: (i // ranks, -stage, i),
    )

"""Units that lose nothing by being where a neighbour is: merged, and the optimum stays the same.

Only where units have one option (`applies`), and only units without bytes if memory is limited.
Let v be the only unit that has to follow w directly,
or the only one that w has to follow. In any solution with w on stage a and v on stage b, w may
move to b: the order still holds. That costs stage a and stage b at most

    Δa = −seconds(w) + Σ what it may have to send or receive more, or surely less
    Δb = +seconds(w) + Σ the same

over the values that w makes or reads; no other stage sees a difference. Where both are ≤ 0
whatever the stages of all other units are, some optimum has w on v's stage. Reshapes, constants
and masks go this way, and operators that make more than they read.

Several such moves can be made in turn if no unit moves after another has moved to it: they form
a forest, walked from the roots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ...compiler.ir.problem import Problem, Value
from .presolve import Reduced, merge

_SLACK = 1e-13  # of all seconds: for sums that are equal but for rounding


def applies(problem: Problem) -> bool:
    """Whether units have one option each, a stage may be empty, and each has its own rank, all
    of which are alike: where they are not, a unit that moves to a neighbour's stage may take more
    seconds there, or come from farther away."""
    return (
        not problem.shares_ranks
        and problem.alike
        and all(len(each) == 1 for each in problem.options)
        and not problem.min_units
        and not problem.together
    )


def contract(reduced: Reduced) -> Reduced:
    """Merge until no unit can be moved to a neighbour for nothing."""
    while applies(reduced.problem):
        groups = _groups(_moves(reduced.problem), reduced.problem.n_units)
        if len(groups) == reduced.problem.n_units:
            break
        reduced = merge(reduced, groups)
    return reduced


def _moves(problem: Problem) -> dict[int, int]:
    """Unit -> the neighbour whose stage is as good."""
    n = problem.n_units
    after: list[list[int]] = [[] for _ in range(n)]
    before: list[list[int]] = [[] for _ in range(n)]
    for u, v in problem.edges:
        after[u].append(v)
        before[v].append(u)
    above, below = _closure(after, range(n)[::-1]), _closure(before, range(n))
    touching: list[list[Value]] = [[] for _ in range(n)]
    for value in problem.values:
        for unit in {value.source, *value.readers}:
            touching[unit].append(value)
    unit_s = problem.fewest_s()
    slack = _SLACK * math.fsum(unit_s)
    held = _with_bytes(problem)
    moves = {}
    for w in range(n):
        if w in problem.pins or w in held:
            continue
        for next_to, beyond in ((after[w], above), (before[w], below)):
            if len(next_to) == 1:
                v = next_to[0]
                if _is_free(w, v, beyond[v], touching[w], unit_s[w], slack):
                    moves[w] = v
                    break
    return moves


def _with_bytes(problem: Problem) -> set[int]:
    """Units that change what a stage holds, if that is limited."""
    if not any(math.isfinite(budget) for budget in problem.budget_bytes):
        return set()
    shared = {u for kept in problem.kept for u, _ in (*kept.users, *kept.unless)}
    return shared | {
        unit
        for unit, (option,) in enumerate(problem.options)
        if option.stash_bytes or option.static_bytes or option.transient_bytes
    }


def _closure(nexts: Sequence[Sequence[int]], order: Iterable[int]) -> list[int]:
    """Per unit, the bits of itself and of all that follow it."""
    reach = [0] * len(nexts)
    for u in order:
        reach[u] = 1 << u
        for v in nexts[u]:
            reach[u] |= reach[v]
    return reach


def _is_free(
    w: int, v: int, beyond: int, values: Sequence[Value], seconds: float, slack: float
) -> bool:
    """Whether w moves from a stage a to that of v, b, without a loss.

    Args:
        beyond: bits of the units that are never on a, since v is between.
    """

    def may_stay(units: Sequence[int]) -> bool:
        return any(not beyond >> unit & 1 for unit in units)

    loss_a, loss_b = -seconds, seconds
    for value in values:
        others = [unit for unit in value.readers if unit not in (v, w)]
        for_v = v in value.readers
        if value.source == w:
            surely_sent = for_v or not all(may_stay([unit]) for unit in others)
            loss_a += value.receive_s * may_stay(others) - value.send_s * surely_sent
            loss_b += value.send_s * bool(others) - value.receive_s * for_v
        elif value.source == v:
            loss_a -= value.receive_s * (not may_stay(others))
            loss_b -= value.send_s * (not others)
        else:
            source_may_stay = may_stay([value.source])
            if source_may_stay:
                loss_a += value.send_s * (not for_v)
            else:
                loss_a -= value.receive_s * (not may_stay(others))
            loss_b += value.receive_s * (not for_v)
    return loss_a <= slack and loss_b <= slack


def _groups(moves: dict[int, int], n: int) -> list[tuple[int, ...]]:
    """What moves to one place, a move that closes a circle left out."""
    root = list(range(n))

    def home(unit: int) -> int:
        while root[unit] != unit:
            unit = root[unit]
        return unit

    for w, v in moves.items():
        if home(v) != w and root[w] == w:
            root[w] = v
    groups: dict[int, list[int]] = {}
    for unit in range(n):
        groups.setdefault(home(unit), []).append(unit)
    return [tuple(group) for group in groups.values()]

"""The stages that a unit can be on, given what must come before and after it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...compiler.ir.problem import Problem

Window = tuple[int, int]
"""(first, last) stage."""


def leaders(problem: Problem) -> list[int]:
    """Per unit, the first unit of its group."""
    leader = list(range(problem.n_units))
    for group in problem.together:
        for unit in group:
            leader[unit] = group[0]
    return leader


def windows(problem: Problem, limit_s: float) -> list[Window] | None:
    """The stages that each unit can be on where no stage takes more than ``limit_s``.

    A unit and all that must come before it fill the stages up to its own: their seconds, bytes
    and, with ``min_units``, the stages that the others have to fill. None where a unit has none.
    The problem's units are in an order that its edges allow (`reduce`).
    """
    leader = leaders(problem)
    reach = np.eye(problem.n_units, dtype=bool)  # [u, v]: v is u or after u
    for u, v in sorted(problem.edges, reverse=True):
        reach[u] |= reach[v]
    reach = reach[leader][:, leader]
    n, last = problem.n_units, problem.n_stages - 1
    loads = _loads(problem, limit_s)
    first = np.zeros(n, dtype=int)
    final = np.full(n, last)
    for amounts, room in loads:
        before, after = reach.T @ amounts, reach @ amounts
        up_to, down_to = np.cumsum(room), np.cumsum(room[::-1])
        slack = 1e-9 * (amounts.sum() + 1e-300)
        first = np.maximum(first, np.searchsorted(up_to + slack, before))
        final = np.minimum(final, last - np.searchsorted(down_to + slack, after))
    if problem.min_units:
        others_before = n - reach.sum(axis=1)  # all that may come before a unit
        others_after = n - reach.sum(axis=0)
        final = np.minimum(final, others_before // problem.min_units)
        first = np.maximum(first, last - others_after // problem.min_units)
    return _propagated(problem, leader, first, final)


def _loads(
    problem: Problem, limit_s: float
) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """(what each unit takes at least, what each stage has) of seconds and of bytes."""
    loads = []
    for kind in sorted(set(problem.kinds)) if math.isfinite(limit_s) else ():
        seconds, most = seconds_within(problem, kind)
        of_stages = np.array([most[problem.kind_of(s)] for s in range(problem.n_stages)])
        if np.all(np.isfinite(of_stages)):
            loads.append((seconds, of_stages * limit_s))
    of_ranks = np.array(problem.budget_bytes) - np.array(problem.reserve_bytes)
    room = of_ranks[list(problem.homes)]
    if np.all(np.isfinite(room)):
        fewest = min(problem.in_flight)
        needed = [
            min(option.static_bytes + fewest * option.stash_bytes for option in each)
            for each in problem.options
        ]
        loads.append((np.array(needed), np.maximum(room, 0.0)))
    return loads


def seconds_within(problem: Problem, kind: int) -> tuple[npt.NDArray[np.float64], dict[int, float]]:
    """Per unit its fewest seconds on a kind of device; and per kind, the most of these that a stage
    on it holds for each second that it takes: as much as of the unit that gains most by it."""
    seconds, most = np.array(problem.fewest_s(kind)), {}
    for other in set(problem.kinds):
        there = np.array(problem.fewest_s(other))
        with np.errstate(divide="ignore", invalid="ignore"):
            gains = seconds[seconds > 0] / there[seconds > 0]
        most[other] = 1.0 if other == kind else float(gains.max(initial=0.0))
    return seconds, most


def _propagated(
    problem: Problem,
    leader: Sequence[int],
    first: npt.NDArray[np.int_],
    final: npt.NDArray[np.int_],
) -> list[Window] | None:
    """Pins and groups put in; the order carries every limit on."""
    for unit, stage in problem.pins.items():
        first[unit], final[unit] = max(first[unit], stage), min(final[unit], stage)
    for unit, lead in enumerate(leader):
        first[lead], final[lead] = max(first[lead], first[unit]), min(final[lead], final[unit])
    for u, v in sorted(problem.edges):
        first[v] = max(first[v], first[u])
    for u, v in sorted(problem.edges, reverse=True):
        final[u] = min(final[u], final[v])
    found = [(int(first[lead]), int(final[lead])) for lead in leader]
    return found if all(a <= b for a, b in found) else None

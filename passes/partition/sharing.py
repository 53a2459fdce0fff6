"""Ranks that hold several stages: divisions with a rank for each, and a part of its memory.

The dynamic program goes from stage to stage, and knows nothing of what two stages of one rank have
in common. So each stage gets a part of its rank's memory, and the slowest stage stands for the
slowest rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from ...compiler.ir.errors import MemoryBudgetError
from ...compiler.ir.problem import Problem, Solution, fits, solution_of
from ..integer.work import Work
from .baselines import in_order, nothing_fits, numbered, rows_of, solve_dynamic
from .lazy import largest_stage_s
from .presolve import reduce
from .segments import (
    Division,
    Floats,
    Line,
    best_division,
    lower_bounds,
    most_even,
    option_table,
)

SHARINGS = 3  # ways to share a rank's memory among its stages
_HALVINGS = 40  # of a price: more than doubles tell apart


def apart(problem: Problem, rooms: Sequence[float] = ()) -> Problem:
    """The same units with a rank for each stage: what fits there fits where ranks hold several.

    Args:
        rooms: bytes per stage; by its microbatches in flight and one more for weights where they
            are left out.
    """
    if not problem.shares_ranks:
        return numbered(problem)
    return replace(
        problem,
        homes=(),
        together_in_flight=(),
        budget_bytes=tuple(rooms or _by_flight(problem)),
        reserve_bytes=(),
        kinds=tuple(problem.kinds[home] for home in problem.homes),
        links=tuple(
            tuple(row[home] for home in problem.homes) for row in rows_of(problem, problem.homes)
        ),
        max_weight=problem.max_weight * problem.n_stages / problem.n_ranks,
    )


def shared_divisions(problem: Problem, work: Work) -> Iterator[Solution]:
    """Divisions where ranks hold several stages; they are evaluated by the problem, and need not
    fit.

    First the best one where each stage may have all of its rank's memory. If it does not fit, its
    stages say what each needs of that, and the next is looked for in such parts; and then in what
    the stages hold and their share of what that leaves: they are not at their fullest in the same
    moment, and have weights in common.

    Raises:
        PartitionError: the order, groups, pins and fewest units allow no division into runs.
    """
    rooms = _whole(problem)
    for number in range(SHARINGS):
        alone, fitted = apart(problem, rooms), True
        try:
            found = solve_dynamic(alone, work=work, whole=problem)
        except MemoryBudgetError as error:
            found, fitted = error.nearest, False
        held = found.ranks_bytes  # each stage's, with one rank for each
        found = solution_of(problem, found.stage, found.option, "dynamic")
        yield found
        if work.over or (not number and (not fitted or fits(problem, found))):
            break
        rooms = _left(problem, found, held) if number else _needed(problem, found, held)


def _by_flight(problem: Problem) -> list[float]:
    """Per stage, of its rank's memory, by its microbatches in flight and one more for weights."""
    rooms = _whole(problem)
    for stages in problem.placement:
        every = sum(problem.in_flight[s] + 1 for s in stages)
        for s in stages:
            rooms[s] *= (problem.in_flight[s] + 1) / every
    return rooms


def _whole(problem: Problem) -> list[float]:
    """Per stage, all of its rank's memory."""
    return [problem.budget_bytes[home] - problem.reserve_bytes[home] for home in problem.homes]


def _needed(problem: Problem, found: Solution, held: Sequence[float]) -> list[float]:
    """Per stage, what it holds but for microbatches, and of the rest of its rank's memory as much
    as its microbatches take of what those of all its stages do."""
    stash = problem.stages_stash(found.stage, found.option)
    moving = [n * each for n, each in zip(problem.in_flight, stash, strict=True)]
    rooms = [0.0] * problem.n_stages
    for rank, stages in enumerate(problem.placement):
        whole = problem.budget_bytes[rank] - problem.reserve_bytes[rank]
        rest = whole - math.fsum(held[s] - moving[s] for s in stages)
        if rest > 0:
            total = math.fsum(moving[s] for s in stages) or 1.0
            for s in stages:
                rooms[s] = held[s] - moving[s] + rest * moving[s] / total
        else:  # weights alone are too much
            total = math.fsum(held[s] for s in stages) or 1.0
            for s in stages:
                rooms[s] = whole * held[s] / total
    return rooms


def _left(problem: Problem, found: Solution, held: Sequence[float]) -> list[float]:
    """Per stage, what it holds by itself and its share, by its microbatches in flight, of what its
    rank has left."""
    rooms = list(held)
    for rank, stages in enumerate(problem.placement):
        left = problem.budget_bytes[rank] - found.ranks_bytes[rank]
        whole = sum(problem.in_flight[s] for s in stages) or 1
        for s in stages:
            rooms[s] += left * problem.in_flight[s] / whole
    return rooms


def roomy_division(problem: Problem) -> Solution:
    """About the best division where each stage may have all of its rank's memory; it need not fit.

    Options are those that a price of memory leads to, the same for all units of a stage: together
    they take what the stage may have, or a little more, and no longer than any that fit.

    Raises:
        MemoryBudgetError: a stage does not fit even so; with the nearest division, whose bytes are
            those of stages.
        PartitionError: pins, groups, order and fewest units contradict each other.
    """
    reduced = reduce(numbered(problem))
    small = reduced.problem
    alone = apart(small, _whole(small))
    line = Line(alone, in_order(alone))
    lows = [lower_bounds(line, s) for s in range(alone.n_stages)]
    first = best_division(lows, alone.max_weight, alone.sum_weight)
    if first is None:
        error = nothing_fits(line, proven=False)
        stage, option = reduced.lift(error.nearest.stage, error.nearest.option)
        error.nearest = replace(error.nearest, stage=stage, option=option)
        raise error
    cuts = [first]
    if small.shares_ranks:
        even = most_even(lows, largest_stage_s(alone, first.objective))
        cuts += [even] if even is not None else []
    found = [_priced(line, each) for each in cuts]
    solutions = [solution_of(small, stage, option, "dynamic") for stage, option in found]
    best = min(solutions, key=lambda each: each.objective)
    return solution_of(problem, *reduced.lift(best.stage, best.option), best.solver)


def _priced(line: Line, division: Division) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Stages and options of a division, which take no longer than any that fit: of each stage those
    to which a price of its bytes leads at which they take its room, or a little more."""
    problem = line.problem
    stage, option = [0] * problem.n_units, [0] * problem.n_units
    for s, i, j in division.segments():
        table, units = option_table(line, s), [u for some in line.positions[i:j] for u in some]
        chosen = [table.fastest[u] for u in units]
        if math.isfinite(problem.budget_bytes[s]) and units and not line.light(s)[i, j]:
            times = table.times[units]  # infinite where there is no such option
            held = np.where(np.isfinite(times), table.held[units], 0.0)
            peak = max(min(o.transient_bytes for o in problem.options[u]) for u in units)
            room = problem.budget_bytes[s] - float(line.fixed_bytes(s)[i, j]) - peak
            chosen = _filling(times, held, room, chosen, max(table.rates, default=0.0))
        for unit, k in zip(units, chosen, strict=True):
            stage[unit], option[unit] = s, k
    return tuple(stage), tuple(option)


def _filling(
    times: Floats, held: Floats, room: float, fastest: list[int], limit: float
) -> list[int]:
    """Options that take at least the room if the fastest do, or all that can be had.

    Lagrange: at a price of bytes others take more seconds, or fewer bytes than these.

    Args:
        limit: the price above which nothing changes.
    """

    def at(rate: float) -> list[int]:
        return [int(k) for k in (times + rate * held).argmin(axis=1)]

    def taken(chosen: list[int]) -> float:
        return float(held[np.arange(len(held)), chosen].sum())

    more, low, high = fastest, 0.0, 1.001 * limit
    less = at(high)
    if taken(more) <= room:
        return more
    if taken(less) >= room:
        return less
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if taken(tried := at(middle)) >= room:
            more, low = tried, middle
        else:
            less, high = tried, middle
    over, chosen = taken(more) - room, list(more)
    for unit, (a, b) in enumerate(zip(more, less, strict=True)):  # at that price they are alike
        saved = float(held[unit, a] - held[unit, b])
        if saved <= over:
            chosen[unit], over = b, over - saved
    return chosen

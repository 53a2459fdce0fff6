"""The simple strategies, beside the optimal one: what people do by hand, and its oracle.

solve_dynamic          contiguous divisions and options jointly; exact where units are a chain
solve_uniform          equal numbers of units
solve_parameters       equal static bytes
solve_sequential       divided first as if memory were free, options afterwards
solve_all_or_nothing   a stage's units take all their first option, or all their last

All give each stage a rank of its own: others are made `apart` before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np

from ...compiler.ir.errors import MemoryBudgetError, PartitionError
from ...compiler.ir.problem import Link, Problem, Solution, solution_of
from ..integer.excess import infeasible
from ..integer.solvers import PROVEN_GAP
from ..integer.work import Work
from .knapsack import Knapsack
from .lazy import CAPS, LineSearch
from .segments import Division, Floats, Line, best_division, lower_bounds


def solve_dynamic(
    problem: Problem,
    *,
    work: Work | None = None,
    positions: Sequence[Sequence[int]] = (),
    whole: Problem | None = None,
) -> Solution:
    """The best division of the units' order into runs, with the best options, within memory.

    Where the order is the only one that the edges allow, that is the optimum, and ``proven``
    says so; ``bound`` then holds for every division, and is −∞ otherwise.

    Args:
        work: after which to take the best so far; 10 s where it is left out.
        positions: the units in another order that the edges allow, groups kept together.
        whole: what the problem stands for, where its ranks hold several stages. Their slowest stage
            tells little of the slowest rank, so that the most even of the divisions that are as
            good is looked for too, and the one taken that is better there.

    Raises:
        MemoryBudgetError: no division into runs fits into memory, or none was found.
        PartitionError: the order, groups, pins and fewest units allow no division into runs.
    """
    started, work = time.perf_counter(), work or Work(10.0)
    line = Line(problem, positions or in_order(problem))
    found, upper, chain = None, math.inf, _is_chain(line)
    lows = [lower_bounds(line, s) for s in range(problem.n_stages)]
    for cap in CAPS:  # a quick solution first: it limits what the next search looks at
        search = LineSearch(line, work, upper, cap, lows)
        found, upper = search.run() or found, search.upper
        if upper - search.bound <= PROVEN_GAP * abs(upper) or work.over:
            break
    if found is None:
        raise nothing_fits(line, proven=chain and search.finished)
    if whole is not None and (even := search.evened()) is not None:
        both = (solution_of(whole, stage, option, "") for stage, option in (found, even))
        better = min(both, key=lambda each: each.objective)
        found = better.stage, better.option
    stage, option = found
    result = solution_of(problem, stage, option, "dynamic", seconds=time.perf_counter() - started)
    bound = min(search.bound, result.objective) if chain else -math.inf
    exact = result.objective - search.bound <= PROVEN_GAP * abs(result.objective)
    note = "" if exact else "not all choices compared"
    return replace(result, bound=bound, proven=chain and exact, note=note)


def quick_objective(problem: Problem) -> float:
    """That no division of the units' order into runs is below; infinite where none fits."""
    line = Line(problem, in_order(problem))
    lows = [lower_bounds(line, s) for s in range(problem.n_stages)]
    found = best_division(lows, problem.max_weight, problem.sum_weight)
    return found.objective if found else math.inf


def solve_uniform(problem: Problem) -> Solution:
    """Equal numbers of units per stage: what splitting by layer count does."""
    return _balanced(problem, [1.0] * problem.n_units, "uniform")


def solve_parameters(problem: Problem) -> Solution:
    """Equal static bytes per stage: what splitting by parameter count does."""
    static = [each[0].static_bytes for each in problem.options]
    return _balanced(problem, static, "parameters")


def solve_sequential(problem: Problem) -> Solution:
    """The best division where everything is kept; then, stage by stage, options that fit."""
    line = Line(problem, in_order(problem))
    cuts = _division(line, [0] * problem.n_units).cuts
    option = [0] * problem.n_units
    for s, (i, j) in enumerate(pairwise(cuts)):
        fitting = Knapsack(line, s, CAPS[-1]).options(i, j)
        if fitting is None:  # the fewest bytes that there are
            fitting = {u: _leanest(problem, u, s) for units in line.positions[i:j] for u in units}
        for unit, k in fitting.items():
            option[unit] = k
    return solution_of(problem, _stages(line, cuts), option, "sequential")


def solve_all_or_nothing(problem: Problem) -> Solution:
    """The best division where each stage keeps all it can, or recomputes all it can."""
    line = Line(problem, in_order(problem))
    last = [len(each) - 1 for each in problem.options]
    costs, kept = [], []
    for s in range(problem.n_stages):
        keep, redo = (_uniform_costs(line, s, ks) for ks in ([0] * problem.n_units, last))
        costs.append(np.minimum(keep, redo))
        kept.append(keep <= redo)
    found = best_division(costs, problem.max_weight, problem.sum_weight)
    cuts = found.cuts if found else _division(line, last).cuts
    option = list(last)
    for s, (i, j) in enumerate(pairwise(cuts)):
        if found and kept[s][i, j]:
            for unit in (u for units in line.positions[i:j] for u in units):
                option[unit] = 0
    return solution_of(problem, _stages(line, cuts), option, "all-or-nothing")


def numbered(problem: Problem) -> Problem:
    """The same with ranks numbered in the order of their first stages: stage s on rank s where
    each has its own, as all that goes from stage to stage takes for granted."""
    ranks = tuple(dict.fromkeys(problem.homes))
    if ranks == tuple(range(problem.n_ranks)):
        return problem
    return replace(
        problem,
        homes=tuple(ranks.index(home) for home in problem.homes),
        together_in_flight=tuple(problem.together_in_flight[rank] for rank in ranks),
        budget_bytes=tuple(problem.budget_bytes[rank] for rank in ranks),
        reserve_bytes=tuple(problem.reserve_bytes[rank] for rank in ranks),
        kinds=tuple(problem.kinds[rank] for rank in ranks),
        links=tuple(tuple(row[rank] for rank in ranks) for row in rows_of(problem, ranks)),
    )


def rows_of(problem: Problem, ranks: Sequence[int]) -> list[tuple[Link, ...]]:
    """The links from some ranks; none where all are alike."""
    return [problem.links[rank] for rank in ranks] if problem.links else []


def in_order(problem: Problem) -> list[tuple[int, ...]]:
    """The units by number, a group at the place of its first."""
    group_of = {unit: tuple(sorted(group)) for group in problem.together for unit in group}
    groups = dict.fromkeys(group_of.get(unit, (unit,)) for unit in range(problem.n_units))
    return list(groups)


def _is_chain(line: Line) -> bool:
    """Whether the edges allow no other order of the positions."""
    linked = {(line.place[u], line.place[v]) for u, v in line.problem.edges}
    return all((p, p + 1) in linked for p in range(line.n - 1))


def _stages(line: Line, cuts: Sequence[int]) -> tuple[int, ...]:
    stage = [0] * line.problem.n_units
    for s, (i, j) in enumerate(pairwise(cuts)):
        for unit in (u for units in line.positions[i:j] for u in units):
            stage[unit] = s
    return tuple(stage)


def _uniform_costs(line: Line, stage: int, option: Sequence[int]) -> Floats:
    """[i, j]: seconds of the segment with given options; infinite where it does not fit."""
    fixed = tuple((each[k],) for each, k in zip(line.problem.options, option, strict=True))
    kept = tuple(
        replace(
            item,
            users=tuple(
                (u, None) for u, which in item.users if which is None or option[u] in which
            ),
            unless=tuple(
                (u, None) for u, which in item.unless if which is None or option[u] in which
            ),
        )
        for item in line.problem.kept
    )
    alone = Line(replace(line.problem, options=fixed, kept=kept), line.positions)
    costs = lower_bounds(alone, stage)
    if alone.linked and math.isfinite(line.problem.budget_bytes[stage]):
        sack = Knapsack(alone, stage, 1)
        for i in range(line.n + 1):
            exact = sack.seconds(i, i, math.inf)[0] + alone.transfer_s[stage][i]
            costs[i] = np.where(np.isfinite(costs[i]), exact, math.inf)
    return costs


def _division(line: Line, option: Sequence[int]) -> Division:
    """The best division with given options, memory apart."""
    problem = line.problem
    free = replace(
        problem,
        options=tuple((each[k],) for each, k in zip(problem.options, option, strict=True)),
        kept=(),
        budget_bytes=(math.inf,) * problem.n_stages,
    )
    alone = Line(free, line.positions)
    costs = [lower_bounds(alone, s) for s in range(problem.n_stages)]
    found = best_division(costs, problem.max_weight, problem.sum_weight)
    if found is None:
        raise PartitionError("no division into runs of units keeps to the pins and groups")
    return found


def most_even(problem: Problem, solution: Solution) -> tuple[int, ...]:
    """Stages of the units, in runs with the same options, whose seconds have the least sum of
    squares that there is with no stage slower than the slowest one is; transfers are left out."""
    line = Line(problem, in_order(problem))
    chosen = [menu[k] for menu, k in zip(problem.options, solution.option, strict=True)]
    here_s = [o.on(problem.kind_of(s)) for o, s in zip(chosen, solution.stage, strict=True)]
    most_s = np.bincount(solution.stage, here_s).max() * (1 + 1e-9)
    squares = []
    for s in range(problem.n_stages):
        run_s = line.sums([option.on(problem.kind_of(s)) for option in chosen])
        squares.append(np.where(line.allowed(s) & (run_s <= most_s), run_s**2, math.inf))
    found = best_division(squares, 0.0, 1.0)
    return solution.stage if found is None else _stages(line, found.cuts)


def _leanest(problem: Problem, unit: int, stage: int) -> int:
    each = problem.options[unit]
    return min(
        range(len(each)),
        key=lambda k: each[k].static_bytes + problem.in_flight[stage] * each[k].stash_bytes,
    )


def nothing_fits(line: Line, *, proven: bool) -> MemoryBudgetError:
    """With the nearest division.

    Raises:
        PartitionError: there is none, memory apart.
    """
    nearest = _nearest(line)
    if nearest is None:
        raise PartitionError("no division into runs of units keeps to the pins and groups")
    return infeasible(line.problem, nearest, proven=proven)


def _nearest(line: Line) -> Solution | None:
    """The division whose largest excess over a budget is small; every unit at its leanest."""
    problem = line.problem
    over = []
    for s, budget in enumerate(problem.budget_bytes):
        held = [
            min(o.static_bytes + problem.in_flight[s] * o.stash_bytes for o in each)
            for each in problem.options
        ]
        used = line.sums(held) + line.fixed_bytes(s)
        limit = budget if math.isfinite(budget) else used.max()
        over.append(np.where(line.allowed(s), used - limit, math.inf))
    lowest = min(float(each[np.isfinite(each)].min(initial=0.0)) for each in over)
    found = best_division([each - lowest for each in over], 1.0, 0.0)
    if found is None:
        return None
    stage = _stages(line, found.cuts)
    option = [_leanest(problem, unit, s) for unit, s in enumerate(stage)]
    return solution_of(problem, stage, option, "dynamic")


def _balanced(problem: Problem, weight: Sequence[float], name: str) -> Solution:
    """Runs whose weights are as even as rounding to whole units makes them; first options."""
    line = Line(problem, in_order(problem))
    each = [math.fsum(weight[u] for u in units) for units in line.positions]
    total, stages = math.fsum(each) or 1.0, problem.n_stages
    middle = [after - w / 2 for w, after in zip(each, accumulate(each), strict=True)]
    cuts = [0, *(sum(m < total * s / stages for m in middle) for s in range(1, stages)), line.n]
    if problem.min_units:
        for s in range(1, stages):
            cuts[s] = max(cuts[s], cuts[s - 1] + problem.min_units)
        for s in reversed(range(1, stages)):
            cuts[s] = min(cuts[s], cuts[s + 1] - problem.min_units)
    return solution_of(problem, _stages(line, cuts), [0] * problem.n_units, name)

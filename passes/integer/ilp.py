"""The partitioning problem as an integer linear program; `runs` has it solved.

    y[u, s] = 1         the stage of unit u is at most s; y[v, s] ≤ y[u, s] for an edge (u, v)
    x[u, s]             y[u, s] − y[u, s − 1]: u is on s
    z[u, s, k]          u is on s with option k; Σ_k z = x
    send, receive       of a value and stage; ≥ x of the one end − x of the other on its rank, times
                        by how much the link between is slower
    meet[s, t]          ≥ x of a value's source on s + x of its reader on t − 1: pays the latency
    kept[w, s]          ≥ z of a user − Σ z of what recomputes it; of a weight kept[w, r]
    transient[r]        ≥ Σ_k transient_k · z of every unit on a stage of rank r

Stages are ordered, so no two solutions differ only in the names of devices; that and windows of
stages for every unit (`passes.integer.windows`) are what makes it solvable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pulp  # type: ignore[import-untyped]

from ...compiler.ir.problem import Kept, Problem, Solution, Users, solution_of
from .excess import excess_bytes
from .runs import SCALE, Answer, Program, run
from .windows import Window, leaders
from .work import Work

_SPREAD = 1e-3  # what the excess of all ranks counts, where the largest one is the same

Terms = dict[Any, float]  # variable -> coefficient; None -> the constant


@dataclass
class _Model:
    """The program while it is built.

    Attributes:
        unit_s: seconds that one unit of time in the program stands for.
        over: largest excess over the budget, for programs that minimise it.
        offset: part of the objective that no variable changes.
    """

    problem: Problem
    windows: Sequence[Window]
    unit_s: float
    program: Any = field(default_factory=lambda: pulp.LpProblem("partition", pulp.LpMinimize))
    y: dict[tuple[int, int], Any] = field(default_factory=dict)
    z: dict[tuple[int, int, int], Any] = field(default_factory=dict)
    over: Any = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        self.leader = leaders(self.problem)

    def variable(self, name: str, upper: float | None = None, *, whole: bool = False) -> Any:
        kind = pulp.LpInteger if whole else pulp.LpContinuous
        return self.program.add_variable(name, 0, upper, cat=kind)

    def require(self, terms: Terms, at_least: float = 0.0) -> None:
        """Σ terms ≥ at_least."""
        low = at_least - terms.pop(None, 0.0)
        terms = {variable: factor for variable, factor in terms.items() if factor}
        if not terms and low > 0:
            terms = {self.variable("never", 0.0): 1.0}
        if terms:
            expression = pulp.LpAffineExpression(terms)
            self.program.addConstraint(pulp.LpConstraint(expression, pulp.LpConstraintGE, rhs=low))

    def x(self, unit: int, stage: int) -> Terms:
        """Unit on stage."""
        terms: Terms = {}
        _add(terms, self._up_to(unit, stage))
        _add(terms, self._up_to(unit, stage - 1), -1.0)
        return terms

    def on_rank_of(self, unit: int, stage: int) -> Terms:
        """Unit on any of the stages that share this one's rank."""
        homes = self.problem.homes
        return _dense(
            (1.0, self.x(unit, s)) for s, home in enumerate(homes) if home == homes[stage]
        )

    def chosen(self, unit: int, stage: int, option: int) -> Terms:
        """Unit on stage with option."""
        first, last = self.windows[unit]
        if len(self.problem.options[unit]) == 1 or not first <= stage <= last:
            return self.x(unit, stage)
        return {self.z[unit, stage, option]: 1.0}

    def _up_to(self, unit: int, stage: int) -> Terms:
        first, last = self.windows[unit]
        if stage < first:
            return {}
        return {None: 1.0} if stage >= last else {self.y[self.leader[unit], stage]: 1.0}


def _add(terms: Terms, more: Terms, factor: float = 1.0) -> None:
    for variable, value in more.items():
        terms[variable] = terms.get(variable, 0.0) + factor * value


def _dense(parts: Iterable[tuple[float, Terms]]) -> Terms:
    total: Terms = {}
    for factor, terms in parts:
        _add(total, terms, factor)
    return total


def minimise_time(
    problem: Problem,
    windows: Sequence[Window],
    start: tuple[Sequence[int], Sequence[int]] | None,
    upper: float,
    *,
    solver: str,
    work: Work,
) -> Answer:
    """The assignment with the smallest objective that fits into memory.

    Args:
        windows: stages that every unit can be on (`passes.integer.windows`).
        start: stages and options to start from; in the windows.
        upper: an objective that is known to be reached, or infinite.
        solver: highs or cbc.

    Raises:
        SolverError: it is not installed, or crashed.
    """
    typical = sum(problem.fewest_s()) / problem.n_stages
    weight = problem.max_weight + problem.sum_weight * problem.n_stages
    scale = upper if math.isfinite(upper) and upper > 0 else (typical * weight or 1.0)
    model = _Model(problem, windows, scale / SCALE)
    _order(model)
    _times(model)
    _memory(model)

    def worth(found: Solution) -> float:
        return found.objective

    return run(_program(model, worth), start, solver, work)


def minimise_excess(
    problem: Problem,
    windows: Sequence[Window],
    start: tuple[Sequence[int], Sequence[int]] | None,
    *,
    solver: str,
    work: Work,
) -> Answer:
    """The assignment whose largest excess over a stage's budget is smallest; bound in bytes.

    Raises:
        SolverError: the solver is not installed, or crashed.
    """
    model = _Model(problem, windows, largest_bytes(problem) / SCALE)
    _order(model)
    model.over = model.variable("over")
    total = _memory(model)
    model.program.setObjective(pulp.LpAffineExpression({model.over: 1.0, **total}))

    def worth(found: Solution) -> float:
        over = excess_bytes(problem, found)
        return max(over) + _SPREAD * math.fsum(over) / problem.n_ranks

    return run(_program(model, worth, bounded=False), start, solver, work)


def _program(model: _Model, worth: Callable[[Solution], float], *, bounded: bool = True) -> Program:
    problem = model.problem

    def evaluated(stage: Sequence[int], option: Sequence[int]) -> Solution:
        return solution_of(problem, stage, option, "")

    def placed(value: Callable[[Any], float]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rounded: solvers may leave values that are not quite whole."""
        stages, options = [], []
        for unit, (first, last) in enumerate(model.windows):
            lead = model.leader[unit]
            s = next((s for s in range(first, last) if value(model.y[lead, s]) > 0.5), last)
            stages.append(s)
            count = len(problem.options[unit])
            each = [value(model.z[unit, s, k]) for k in range(count)] if count > 1 else [1.0]
            options.append(each.index(max(each)))
        return tuple(stages), tuple(options)

    def started(stage: Sequence[int], option: Sequence[int]) -> dict[Any, int]:
        values = {y: int(stage[unit] <= s) for (unit, s), y in model.y.items()}
        for (unit, s, k), z in model.z.items():
            values[z] = int(stage[unit] == s and option[unit] == k)
        return values

    return Program(
        model.program,
        model.unit_s,
        model.offset,
        placed,
        started,
        evaluated,
        worth,
        problem if bounded else None,
    )


def largest_bytes(problem: Problem) -> float:
    """The largest budget that is finite, or what one unit needs if that is more."""
    finite = (budget for budget in problem.budget_bytes if math.isfinite(budget))
    return _typical_bytes(problem, max(finite, default=0.0))


def _typical_bytes(problem: Problem, budget: float) -> float:
    """Of a stage's bytes, for a scale: its budget, if one unit fits in; positive."""
    fewest_in_flight = min(problem.in_flight)
    leanest = (
        min(o.static_bytes + fewest_in_flight * o.stash_bytes + o.transient_bytes for o in each)
        for each in problem.options
    )
    return max(budget, *leanest) or 1.0


def _order(model: _Model) -> None:
    """Which stage, which option; at least so many units on a stage."""
    problem, leader = model.problem, model.leader
    for unit, (first, last) in enumerate(model.windows):
        if leader[unit] == unit:
            for s in range(first, last):
                model.y[unit, s] = model.variable(f"y_{unit}_{s}", 1, whole=True)
            for s in range(first + 1, last):
                model.require({model.y[unit, s]: 1.0, model.y[unit, s - 1]: -1.0})
        count = len(problem.options[unit])
        for s in range(first, last + 1) if count > 1 else ():
            for k in range(count):
                model.z[unit, s, k] = model.variable(f"z_{unit}_{s}_{k}", 1, whole=True)
            each = {model.z[unit, s, k]: 1.0 for k in range(count)}
            _equal(model, each, model.x(unit, s))
    for u, v in problem.edges:
        for s in range(problem.n_stages - 1):
            model.require(_dense([(1.0, model._up_to(u, s)), (-1.0, model._up_to(v, s))]))
    for s in range(problem.n_stages if problem.min_units else 0):
        on_stage = _dense((1.0, model.x(unit, s)) for unit in range(problem.n_units))
        model.require(on_stage, problem.min_units)


def _equal(model: _Model, left: Terms, right: Terms) -> None:
    model.require(_dense([(1.0, left), (-1.0, right)]))
    model.require(_dense([(-1.0, left), (1.0, right)]))


def _times(model: _Model) -> None:
    """Objective: stage times, with what the stages send and receive."""
    problem = model.problem
    longest = model.variable("max_s")
    objective: Terms = {longest: problem.max_weight}
    loads: list[Terms] = [{} for _ in range(problem.n_stages)]
    for unit, options in enumerate(problem.options):
        first, last = model.windows[unit]
        for s in range(first, last + 1):
            for k, option in enumerate(options):
                seconds = option.on(problem.kind_of(s))
                _add(loads[s], model.chosen(unit, s, k), seconds / model.unit_s)
    for number in range(len(problem.values)):
        _transfer(model, number, loads)
    _meet(model, loads)
    for stages in problem.placement:
        load = _dense((1.0, loads[s]) for s in stages)
        model.require(_dense([(1.0, {longest: 1.0}), (-1.0, load)]))
        if problem.sum_weight:
            _add(objective, load, problem.sum_weight)
    model.offset = objective.pop(None, 0.0)  # PuLP does not pass it on to HiGHS
    model.program.setObjective(pulp.LpAffineExpression(objective))


def _transfer(model: _Model, number: int, loads: list[Terms]) -> None:
    """What a value adds to the time of every stage: sent if another rank reads it, received once
    by each stage there that does."""
    value = model.problem.values[number]
    ends = [model.windows[unit] for unit in (value.source, *value.readers)]
    if all(first == last == ends[0][0] for first, last in ends):
        return
    stages, link = range(model.problem.n_stages), model.problem.link
    first, last = model.windows[value.source]
    for s in range(first, last + 1) if value.send_s else ():
        slower = [link(s, t).slower for t in stages]
        send = model.variable(f"send_{number}_{s}", max(slower))
        for reader in value.readers:
            _travels(model, send, s, (value.source, reader), slower)
        _add(loads[s], {send: 1.0}, value.send_s / model.unit_s)
    for s in stages if value.receive_s else ():
        near = [u for u in value.readers if model.windows[u][0] <= s <= model.windows[u][1]]
        slower = [link(t, s).slower for t in stages]
        receive = model.variable(f"receive_{number}_{s}", max(slower))
        for reader in near:
            _travels(model, receive, s, (reader, value.source), slower)
        if near:
            _add(loads[s], {receive: 1.0}, value.receive_s / model.unit_s)


def _travels(
    model: _Model, taken: Any, s: int, ends: tuple[int, int], slower: Sequence[float]
) -> None:
    """What a value takes of a stage, if the one end is there and the other on another rank.

    Args:
        slower: per stage of the other end, how much.
    """
    homes, (near, far) = model.problem.homes, ends
    here = model.x(near, s)
    away = [slower[t] for t, home in enumerate(homes) if home != homes[s]]
    least, most = min(away, default=0.0), max(away, default=0.0)
    there = model.on_rank_of(far, s)
    model.require(_dense([(1.0, {taken: 1.0}), (-least, here), (least, there)]))
    if least == most:
        return
    first, last = model.windows[far]
    over = _dense(
        (slower[t], model.x(far, t)) for t in range(first, last + 1) if homes[t] != homes[s]
    )
    model.require(_dense([(1.0, {taken: 1.0}), (-1.0, over), (most, {None: 1.0}), (-most, here)]))


def _meet(model: _Model, loads: list[Terms]) -> None:
    """The latency between two stages of which one reads what the other makes."""
    problem = model.problem
    pairs: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for value in problem.values if problem.links else ():
        first, last = model.windows[value.source]
        for reader in set(value.readers) if value.send_s or value.receive_s else ():
            for t in range(model.windows[reader][0], model.windows[reader][1] + 1):
                for s in range(first, last + 1):
                    if problem.homes[s] != problem.homes[t] and problem.link(s, t).latency_s:
                        pairs.setdefault((s, t), set()).add((value.source, reader))
    for (s, t), ends in pairs.items():
        meet = model.variable(f"meet_{s}_{t}", 1)
        for source, reader in sorted(ends):
            both = [(-1.0, model.x(source, s)), (-1.0, model.x(reader, t)), (1.0, {None: 1.0})]
            model.require(_dense([(1.0, {meet: 1.0}), *both]))
        _add(loads[t], {meet: 1.0}, problem.link(s, t).latency_s / model.unit_s)


def _memory(model: _Model) -> Terms:
    """Bytes of every rank within its budget; the excess of all ranks if that is allowed."""
    problem, excess = model.problem, {}
    for rank, budget in enumerate(problem.budget_bytes):
        if not math.isfinite(budget):
            continue
        unit_bytes = _typical_bytes(problem, budget) / SCALE
        transient = model.variable(f"transient_{rank}")
        used: Terms = {None: problem.reserve_bytes[rank] / unit_bytes, transient: 1.0}
        stashes = [
            _stage_memory(model, s, transient, used, unit_bytes) for s in problem.placement[rank]
        ]
        _shared_once(model, rank, used, unit_bytes)
        if model.over is not None:
            more = model.variable(f"over_{rank}")
            excess[more] = _SPREAD / problem.n_ranks
            _add(used, {more: -model.unit_s / unit_bytes})
            model.require({model.over: 1.0, more: -1.0})
        for counts in problem.together_in_flight[rank]:
            at_once = _dense([(1.0, used), *zip(map(float, counts), stashes, strict=True)])
            model.require(_dense([(-1.0, at_once)]), -budget / unit_bytes)
    return excess


def _stage_memory(model: _Model, s: int, transient: Any, used: Terms, unit_bytes: float) -> Terms:
    """What a microbatch keeps on a stage; what units hold all the time is added to ``used``."""
    stash: Terms = {}
    for unit, options in enumerate(model.problem.options):
        first, last = model.windows[unit]
        if not first <= s <= last:
            continue
        peak: Terms = {transient: 1.0}
        for k, option in enumerate(options):
            chosen = model.chosen(unit, s, k)
            _add(used, chosen, option.static_bytes / unit_bytes)
            _add(stash, chosen, option.stash_bytes / unit_bytes)
            _add(peak, chosen, -option.transient_bytes / unit_bytes)
        model.require(peak)
    for number, kept in enumerate(model.problem.kept):
        if kept.per_microbatch and kept.bytes:
            held = _held(model, f"kept_{number}_{s}", kept, (s,))
            _add(stash, held, kept.bytes / unit_bytes)
    return stash


def _shared_once(model: _Model, rank: int, used: Terms, unit_bytes: float) -> None:
    stages = model.problem.placement[rank]
    for number, kept in enumerate(model.problem.kept):
        if not kept.per_microbatch and kept.bytes:
            held = _held(model, f"kept_{number}_on_{rank}", kept, stages)
            _add(used, held, kept.bytes / unit_bytes)


def _held(model: _Model, name: str, kept: Kept, stages: Sequence[int]) -> Terms:
    """Whether shared bytes are taken on any of some stages; nothing where no user can be there."""
    users = [(s, terms) for s in stages for terms in _on(model, kept.users, s)]
    if not users:
        return {}
    held = model.variable(name, 1)
    for s, terms in users:
        recomputed = _dense((1.0, each) for each in _on(model, kept.unless, s))
        model.require(_dense([(1.0, {held: 1.0}), (-1.0, terms), (1.0, recomputed)]))
    return {held: 1.0}


def _on(model: _Model, users: Users, s: int) -> list[Terms]:
    """Per user that can be on a stage: whether it is, with an option that counts."""
    found = []
    for unit, which in users:
        first, last = model.windows[unit]
        if first <= s <= last and which is None:
            found.append(model.x(unit, s))
        elif first <= s <= last and which:
            found.append(_dense((1.0, model.chosen(unit, s, k)) for k in sorted(which)))
    return found

"""The best order there is, proven by a solver: for small problems, to measure the search by.

An integer program. Every step has a start; of two steps of one rank that could run in either order
a binary variable says which comes first. Then memory is linear: what a rank holds when F starts is
what the steps that come first have taken and given back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import networkx as nx
import pulp  # type: ignore[import-untyped]

from ..integer.solvers import GAP, SolverError, solver_of
from ..integer.work import Work
from .problem import B, F, Order, Problem, Step, W, allowed
from .timing import times_of

BINARIES = 2_000  # more than that is hopeless


@dataclass(frozen=True)
class Proof:
    """What a solver has found out.

    Attributes:
        order: the best one found.
        seconds: what counts of it (`timing.Span`).
        bound_s: no order is faster.
        start_s: what the order takes that it began with.
    """

    order: Order
    seconds: float
    bound_s: float
    start_s: float

    @property
    def gap(self) -> float:
        """By how much the order may be above the best one, as a part of that."""
        return self.seconds / self.bound_s - 1 if self.bound_s > 0 else math.inf


def proven(problem: Problem, order: Order, time_limit_s: float = 60.0) -> Proof:
    """The best order, from one that is legal and fits; the best so far when time runs out.

    Raises:
        ValueError: the problem is too large to try.
        SolverError: the solver crashed.
    """
    times = times_of(problem, order)
    assert times is not None, "the order to start from waits for itself"
    best = Proof(order, times.span[0], 0.0, times.span[0])
    unit = max(best.seconds, 1e-30)
    work = Work(time_limit_s)
    for warm in (True, False):  # a start may mislead the solver: `passes.integer.runs`
        if best.gap > GAP and not work.over:
            best = _solved(problem, best, unit, warm, work)
    return best


def _solved(problem: Problem, best: Proof, unit: float, warm: bool, work: Work) -> Proof:
    model = _Model(_scaled(problem, unit), best.order)
    if not warm:
        model.forget()
    solver = solver_of("highs", work, warm, 0)
    try:
        model.program.solve(solver)
    except Exception as error:  # whatever a solver's binding raises
        raise SolverError(f"highs failed: {error}") from error
    bound_s = max(best.bound_s, solver.bound * unit)
    if model.program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        found = model.order()
        times = times_of(problem, found)
        if times is not None and problem.fits(found) and times.span[0] < best.seconds:
            best = replace(best, order=found, seconds=times.span[0])
    return replace(best, bound_s=min(bound_s, best.seconds))


def _scaled(problem: Problem, unit: float) -> Problem:
    """Seconds near 1, which solvers like."""
    forward, backward, weight = (tuple(x / unit for x in row) for row in problem.seconds)
    return replace(
        problem,
        forward_s=forward,
        backward_s=backward,
        weight_s=weight,
        transfers=tuple((a, b, s / unit) for a, b, s in problem.transfers),
    )


class _Model:
    """The program, its variables, and the values that these start from."""

    def __init__(self, problem: Problem, order: Order) -> None:
        self.problem = problem
        self.program = pulp.LpProblem("order", pulp.LpMinimize)
        times = times_of(problem, order)
        assert times is not None
        pairs = zip(order, times.starts, strict=True)
        begun = {x: t for steps, starts in pairs for x, t in zip(steps, starts, strict=True)}
        self.horizon = 2 * times.end_s + times.longest_s
        self.starts: dict[Step, Any] = {}
        for number, step in enumerate(begun):
            self.starts[step] = self._variable(f"start_{number}", begun[step])
        self.waits = _waits(problem)
        for a, b, data in self.waits.edges(data=True):
            self.program += self.starts[b] >= self.starts[a] + data["seconds"]
        self.first: dict[tuple[Step, Step], Any] = {}
        self._order(order, begun)
        self._memory(order)
        self._objective(order, times.span[0], begun)

    def _variable(self, name: str, value: float, category: str = "Continuous") -> Any:
        high = 1 if category == "Binary" else self.horizon
        variable = self.program.add_variable(name, 0, high, cat=category)
        variable.setInitialValue(value)
        return variable

    def forget(self) -> None:
        """The values to start from."""
        for variable in self.program.variables():
            variable.varValue = None

    def _order(self, order: Order, begun: dict[Step, float]) -> None:
        before = {step: nx.descendants(self.waits, step) for step in begun}
        for steps in order:
            for a, b in combinations(steps, 2):
                if b in before[a] or a in before[b]:
                    self.first[a, b], self.first[b, a] = int(b in before[a]), int(a in before[b])
                    continue
                if len(self.first) > 2 * BINARIES:
                    raise ValueError(f"{self.problem.steps} steps are too many to prove an order")
                which = self._variable(f"first_{len(self.first)}", 1.0, "Binary")
                self.first[a, b], self.first[b, a] = which, 1 - which
                for x, y in ((a, b), (b, a)):
                    late = self.horizon * (1 - self.first[x, y])
                    self.program += self.starts[y] >= self.starts[x] + self._seconds(x) - late

    def _seconds(self, step: Step) -> float:
        return self.problem.seconds[step[0]][step[1]]

    def _memory(self, order: Order) -> None:
        for rank, steps in enumerate(order):
            limit = allowed(self.problem.limit_bytes[rank])
            if math.isinf(limit):
                continue
            for step in steps:
                if (more := self._more(step)) > 0:
                    held = pulp.lpSum(
                        self.first[other, step] * (self._more(other) / limit)
                        for other in steps
                        if other != step
                    )
                    self.program += held <= 1 - more / limit

    def _more(self, step: Step) -> float:
        """Bytes that a rank holds more after it."""
        kind, stage, _ = step
        stash, carry = self.problem.stash_bytes[stage], self.problem.carried[stage]
        return (stash, carry - stash, -carry)[kind]

    def _objective(self, order: Order, seconds: float, begun: dict[Step, float]) -> None:
        longest = self._variable("longest", seconds)
        self.program += longest
        for rank, steps in enumerate(order):
            if not steps:
                continue
            known = 0.0 if self.problem.by_end else begun[steps[0]]
            opening = self._variable(f"opening_{rank}", known)
            self.program += longest >= sum(map(self._seconds, steps))
            for step in steps:
                if self.problem.by_end:
                    self.program += opening <= 0
                elif step[0] == F and step[2] == 0:
                    self.program += opening <= self.starts[step]
                self.program += longest >= self.starts[step] + self._seconds(step) - opening

    def order(self) -> Order:
        """By how many steps come first."""
        made = []
        for stages in self.problem.placement:
            steps = [step for step in self.starts if step[1] in stages]
            made.append(tuple(sorted(steps, key=lambda step: self._place(step, steps))))
        return tuple(made)

    def _place(self, step: Step, steps: list[Step]) -> int:
        return sum(round(pulp.value(self.first[x, step])) for x in steps if x != step)


def _waits(problem: Problem) -> nx.DiGraph[Step]:
    """What waits for what, whatever the order; ``seconds`` from one start to the other."""
    graph: nx.DiGraph[Step] = nx.DiGraph()

    def add(a: Step, b: Step, under_way: float = 0.0) -> None:
        graph.add_edge(a, b, seconds=problem.seconds[a[0]][a[1]] + under_way)

    for s in range(problem.n_stages):
        kinds = (F, B, W) if problem.splits[s] else (F, B)
        for i in range(problem.microbatches):
            for a, b in pairwise(kinds):
                add((a, s, i), (b, s, i))
            for kind in kinds:
                if i:
                    add((kind, s, i - 1), (kind, s, i))
                for other, under_way in problem.before[kind][s] if kind != W else ():
                    add((kind, other, i), (kind, s, i), under_way)
    return graph

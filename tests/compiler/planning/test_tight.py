"""What a budget leaves is used: reserves are lowered while it pays; a local search fills up."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from pipecompile.compiler.ir.problem import Option, Problem, Solution, solution_of
from pipecompile.compiler.planning import planner as planning
from pipecompile.compiler.planning.planner import Drafted, Planner
from support.problems import every_solution

BUDGET = 1000.0


def layers(seed: int, n: int = 6) -> Problem:
    """Few units on two stages; each may be computed again, at a price of its own."""
    random_ = random.Random(seed)
    options = []
    for _ in range(n):
        seconds, size = random_.randint(80, 120), random_.randint(250, 350)
        again = [random_.randint(5, 40) for _ in range(2)]
        options.append(
            (
                Option(seconds, 0, size),
                Option(seconds + again[0], 0, 0.8 * size),
                Option(seconds + sum(again), 0, 0.5 * size),
            )
        )
    edges = tuple((u, u + 1) for u in range(n - 1))
    return Problem(tuple(options), edges, 2, budget_bytes=(BUDGET,) * 2, min_units=1)


def hidden_bytes(solution: Solution, seed: int) -> list[float]:
    """What the programs of a division take beyond their price."""
    each = random.Random(repr((solution.stage, solution.option, seed)))
    return [each.uniform(40, 70) for _ in range(2)]


class Small(Planner):
    """Plans a problem that is given, and keeps what was drafted."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.given, self.seed, self.budgets = problem, seed, problem.budget_bytes
        self.options: Any = SimpleNamespace(time_limit_s=30.0, n_stages=2, solver="auto")
        self.drafts: list[Solution] = []

    def problem(self, prices: object) -> Problem:
        return self.given

    def _decision(self, prices: object, solution: Solution) -> Any:
        self.drafts.append(solution)
        return SimpleNamespace(solution=solution, recomputed=("some",))

    def _refined(self, problem: Problem, prices: object, solution: Solution) -> Solution:
        return solution

    def draft(self, decision: Any) -> Sequence[Any]:
        return [SimpleNamespace(needed_bytes=each) for each in self.peaks(decision.solution)]

    def peaks(self, solution: Solution) -> list[float]:
        priced = self.given.ranks_bytes(solution.stage, solution.option)
        return [a + b for a, b in zip(priced, hidden_bytes(solution, self.seed), strict=True)]

    def best(self) -> float:
        fitting = (x for x in every_solution(self.given) if max(self.peaks(x)) <= BUDGET)
        return min(x.objective for x in fitting)

    def planned(self) -> float:
        return float(self.decide(self.draft, ()).solution.objective)  # type: ignore[arg-type]


def test_reserves_are_lowered_while_the_problem_promises_a_shorter_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On average over many problems, and never to more than before."""
    ours = [Small(layers(seed), seed) for seed in range(12)]
    planned = [each.planned() for each in ours]
    assert all(len(each.drafts) <= planning.ATTEMPTS + 1 for each in ours)
    monkeypatch.setattr(planning, "_promises", lambda *_: False)
    before = [Small(layers(seed), seed).planned() for seed in range(12)]
    assert all(a <= b for a, b in zip(planned, before, strict=True))
    assert sum(planned) < sum(before)


class Polishing(Small):
    """Whose local search always wants to keep one more unit."""

    def __init__(self, wanted: Sequence[Solution]) -> None:
        super().__init__(layers(0), 0)
        self.wanted = list(wanted)
        self.searched: list[Problem] = []

    def _refined(self, problem: Problem, prices: object, solution: Solution) -> Solution:
        self.searched.append(problem)
        return self.wanted.pop(0) if self.wanted else solution

    def drafted(self, solution: Solution) -> Drafted:
        decision: Any = SimpleNamespace(solution=solution, recomputed=("some",))
        return Drafted(self.given, solution, decision, tuple(self.draft(decision)))


def test_the_local_search_works_in_the_memory_that_the_programs_leave() -> None:
    stage, full = (0, 0, 0, 1, 1, 1), (2,) * 6
    lean = solution_of(layers(0), stage, full, "", bound=1.0, proven=True)
    large = replace(lean, option=(0,) * 6, ranks_bytes=(math.inf, math.inf))
    fine = solution_of(layers(0), stage, (1, *full[1:]), "", bound=1e9)
    planner = Polishing([large, fine])
    best = planner.drafted(lean)
    found = planner._polished(best, (), planner.draft)  # type: ignore[arg-type]
    assert found.solution.option == fine.option
    assert found.solution.bound == found.solution.objective  # a smaller one was said to be less
    first, second = planner.searched
    exact = first.ranks_bytes(stage, full)  # priced as its programs are
    assert exact == pytest.approx(best.peak_bytes)
    assert all(a <= b for a, b in zip(first.reserve_bytes, second.reserve_bytes, strict=True))


def test_where_nothing_better_fits_the_solution_stays() -> None:
    lean = solution_of(layers(0), (0, 0, 0, 1, 1, 1), (2,) * 6, "")
    large = solution_of(layers(0), (0, 0, 0, 0, 0, 1), (0,) * 6, "")
    planner = Polishing([large] * 9)
    best = planner.drafted(lean)
    assert planner._polished(best, (), planner.draft) is best  # type: ignore[arg-type]
    assert len(planner.searched) == planning.POLISHES

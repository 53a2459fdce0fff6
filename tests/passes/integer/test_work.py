"""Plans do not depend on how fast the machine is, or on what else it does."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from pipecompile.compiler.ir.problem import Problem, Solution
from pipecompile.passes.integer import work
from pipecompile.passes.integer.work import Work
from pipecompile.passes.partition.solve import solve
from support.problems import chain, diamonds, wide


def told(found: Solution) -> Solution:
    """All but the clock's seconds."""
    return replace(found, seconds=0.0)


def hard(solver: str) -> tuple[Problem, float, str]:
    problem = wide(6, 6, sizes=1000) if solver == "auto" else diamonds(8, 4, sizes=1000)
    return problem, 0.3, solver


CASES = [
    (chain(24, 4, budget_gib=28), 0.02, "dynamic"),
    hard("auto"),
    hard("highs"),
]


def slow_clock(rate: float) -> Callable[[], float]:
    """A clock that shows ``rate`` seconds more each time it is read."""
    ticks = itertools.count()
    return lambda: next(ticks) * rate


@pytest.mark.parametrize(("problem", "limit_s", "solver"), CASES)
def test_the_answer_of_a_search_that_is_cut_short_is_that_of_any_clock(
    problem: Problem, limit_s: float, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = solve(problem, time_limit_s=limit_s, solver=solver)
    assert not quick.proven
    assert "time limit" in quick.note or solver == "dynamic"
    monkeypatch.setattr(work.time, "perf_counter", slow_clock(1e-3))
    assert told(solve(problem, time_limit_s=limit_s, solver=solver)) == told(quick)


def test_the_clock_is_a_last_resort_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(diamonds(2, 3, sizes=9), sum_weight=0.25)
    best = solve(problem)
    assert best.proven
    monkeypatch.setattr(work, "PATIENCE", 0.0)
    monkeypatch.setattr(work, "PATIENCE_S", 0.0)
    found = solve(problem)
    assert not found.proven
    assert "stopped by the clock after" in found.note


def test_parts_of_work_are_spent_in_the_whole() -> None:
    whole = Work(10.0)
    part = whole.part(4.0)
    part.spend(3.0)
    assert (part.left_s, whole.left_s) == (1.0, 7.0)
    whole.spend(6.5)
    assert part.left_s == 0.5
    assert not part.over
    part.spend(0.5)
    assert part.over
    assert whole.over
    assert not whole.late


SPIN = "while True: pass"


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "limit_s", "solver"), CASES)
def test_two_processes_that_spin_beside_it_change_nothing(
    problem: Problem, limit_s: float, solver: str
) -> None:
    alone = solve(problem, time_limit_s=4 * limit_s, solver=solver)
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(2)]
    try:
        time.sleep(0.2)
        beside = solve(problem, time_limit_s=4 * limit_s, solver=solver)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert told(beside) == told(alone)

"""Solvers print nothing of their own, which would stand in what commands print for programs."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pipecompile.compiler.ir.errors import MemoryBudgetError, PartitionError
from pipecompile.compiler.ir.problem import Problem
from pipecompile.passes.integer import ilp
from pipecompile.passes.integer.windows import windows
from pipecompile.passes.integer.work import Work
from pipecompile.passes.partition.solve import SOLVERS, solve
from pipecompile.passes.sequencing.exact import proven
from support.problems import chain, diamonds, misleading
from support.sequences import drawn, one_by_one


def branching() -> Problem:
    """Of no chain, so that only the integer program proves anything."""
    return replace(diamonds(2, 3, sizes=9), sum_weight=0.25)


def tight(problem: Problem) -> Problem:
    return replace(problem, budget_bytes=(1.0,) * problem.n_ranks)


def finds(problem: Problem, solver: str) -> None:
    assert solve(problem, solver=solver).objective > 0


def runs_out_of_time(problem: Problem, solver: str) -> None:
    large = replace(diamonds(8, 4, sizes=9), sum_weight=0.25)
    solve(large, solver=solver, time_limit_s=0.3)


def fits_nowhere(problem: Problem, solver: str) -> None:
    with pytest.raises(MemoryBudgetError):
        solve(tight(problem), solver=solver)


def contradicts_itself(problem: Problem, solver: str) -> None:
    with pytest.raises(PartitionError):
        solve(replace(problem, min_units=problem.n_units), solver=solver)


CASES = (finds, runs_out_of_time, fits_nowhere, contradicts_itself)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", CASES)
def test_solving_prints_nothing(
    case: Callable[[Problem, str], None], solver: str, capfd: pytest.CaptureFixture[str]
) -> None:
    case(branching(), solver)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("solver", ["highs", "cbc"])
@pytest.mark.parametrize("warm", [False, True])
def test_integer_programs_print_nothing(
    solver: str, warm: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """From a start and without; with one that HiGHS would call optimal; where there is no
    solution; where memory is short."""
    for problem in (branching(), misleading(), chain(6, 3, budget_gib=4)):
        limits = windows(problem, math.inf)
        assert limits is not None
        best = solve(replace(problem, budget_bytes=(math.inf,) * problem.n_ranks))
        start = (best.stage, best.option) if warm else None
        told = {"solver": solver, "work": Work(5.0)}
        ilp.minimise_time(problem, limits, start, best.objective, **told)
        ilp.minimise_time(tight(problem), limits, None, math.inf, **told)
        ilp.minimise_excess(tight(problem), limits, start, **told)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("seconds", [20, 0])
def test_proving_an_order_prints_nothing(seconds: float, capfd: pytest.CaptureFixture[str]) -> None:
    problem = drawn(1, 2, 1, 3)
    proven(problem, one_by_one(problem), seconds)
    assert capfd.readouterr() == ("", "")


FIRST = """
from dataclasses import replace
from pipecompile.passes.partition.solve import solve
from support.problems import diamonds
assert solve(replace(diamonds(2, 3, sizes=9), sum_weight=0.25), solver={!r}).proven
"""


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_the_first_solve_of_a_process_prints_nothing(solver: str) -> None:
    """Some lines come once."""
    command = [sys.executable, "-c", FIRST.format(solver)]
    tests = str(Path(__file__).parents[2])
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")

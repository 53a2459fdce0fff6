"""Solvers that are missing, crash, or call their start optimal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from pipecompile.compiler.ir.problem import Problem, fits
from pipecompile.passes.integer import solvers
from pipecompile.passes.partition import lattice
from pipecompile.passes.partition.solve import solve
from support.problems import diamonds


@pytest.fixture(autouse=True)
def only_integer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lattice, "MOST_CELLS", 0.0)


def unavailable(*_: object) -> bool:
    return False


def crash(*_: object) -> None:
    raise RuntimeError("out of ideas")


def idle(*_: object) -> None:
    """As HiGHS is that runs with other threads elsewhere in the process."""


def small_diamonds() -> Problem:
    return replace(diamonds(2, 3, sizes=9), sum_weight=0.25)


def test_cbc_stands_in_for_a_missing_highs(monkeypatch: pytest.MonkeyPatch) -> None:
    best = solve(small_diamonds(), solver="highs")
    monkeypatch.setattr(solvers.WarmHighs, "available", unavailable)
    found = solve(small_diamonds())
    assert found.proven
    assert found.objective == pytest.approx(best.objective)
    assert "highs is not installed" in found.note


@pytest.mark.parametrize(("call", "why"), [(crash, "out of ideas"), (idle, "Not Set")])
def test_a_solver_that_crashes_is_named_and_replaced(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., None], why: str
) -> None:
    best = solve(small_diamonds(), solver="highs")
    monkeypatch.setattr(solvers.WarmHighs, "callSolver", call)
    found = solve(small_diamonds())
    assert found.proven
    assert found.objective == pytest.approx(best.objective)
    assert f"highs failed: {why}" in found.note


def start_of(lp: Any) -> dict[int, float]:
    return {v.index: v.varValue for v in lp.variables() if v.varValue is not None}


class StuckHighs(solvers.WarmHighs):
    """Calls its start optimal, although its bound is lower."""

    start: dict[int, float]

    def callSolver(self, lp: Any) -> None:  # noqa: N802
        self.start = start_of(lp)
        for column, value in self.start.items():
            lp.solverModel.changeColBounds(column, value, value)
        lp.solverModel.run()

    def findSolutionValues(self, lp: Any) -> tuple[int, int]:  # noqa: N802
        status = super().findSolutionValues(lp)
        self.bound *= 0.9 if self.start else 1.0
        return status


class LyingHighs(StuckHighs):
    """Calls its start optimal, and tells the objective and the bound of something better."""

    part = 0.5

    def findSolutionValues(self, lp: Any) -> tuple[int, int]:  # noqa: N802
        status = super().findSolutionValues(lp)
        if self.start and self.objective is not None:
            self.objective = self.bound = self.part * self.objective
        return status


class GloomyHighs(LyingHighs):
    """Tells a bound above what its start is worth."""

    part = 1.5


class BlindHighs(solvers.WarmHighs):
    """Finds no solution where it has one to start from."""

    def findSolutionValues(self, lp: Any) -> tuple[int, int]:  # noqa: N802
        status = super().findSolutionValues(lp)
        hopeless = (solvers.pulp.LpStatusInfeasible, solvers.pulp.LpSolutionInfeasible)
        return hopeless if self.start else status

    def callSolver(self, lp: Any) -> None:  # noqa: N802
        self.start = start_of(lp)
        super().callSolver(lp)


LIARS = [StuckHighs, LyingHighs, GloomyHighs, BlindHighs]


@pytest.mark.parametrize("liar", LIARS)
def test_a_solver_that_its_start_misleads_is_asked_again_without_it(
    liar: type[solvers.WarmHighs], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = solve(small_diamonds(), solver="highs")
    assert best.solver == "highs"
    monkeypatch.setattr(solvers, "WarmHighs", liar)
    found = solve(small_diamonds(), solver="highs")
    assert found.proven
    assert not found.note
    assert found.objective == pytest.approx(best.objective)


@pytest.mark.parametrize("part", [0.5, 1.5])
def test_nothing_is_proven_by_a_solver_that_always_contradicts_itself(
    part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Liar(solvers.WarmHighs):
        def findSolutionValues(self, lp: Any) -> tuple[int, int]:  # noqa: N802
            status = super().findSolutionValues(lp)
            self.objective = self.bound = part * (self.objective or 0.0)
            return status

    best = solve(small_diamonds(), solver="highs")
    simple = small_diamonds()
    monkeypatch.setattr(solvers, "WarmHighs", Liar)
    found = solve(simple, solver="highs")
    assert not found.proven
    assert found.bound < best.objective
    assert "highs contradicts itself: its solution is worth" in found.note
    assert fits(simple, found)


def test_without_any_solver_the_best_contiguous_division_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(solvers.WarmHighs, "available", unavailable)
    monkeypatch.setattr(solvers.pulp.PULP_CBC_CMD, "available", unavailable)
    found = solve(small_diamonds())
    assert fits(small_diamonds(), found)
    assert not found.proven
    assert "highs is not installed, cbc is not installed, best contiguous division" in found.note

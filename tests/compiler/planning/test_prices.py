"""What the planner believes of a division against the programs that follow from it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from pipecompile.compiler.costs.hardware import H100
from pipecompile.compiler.ir.actions import from_text
from pipecompile.compiler.ir.errors import MemoryBudgetError
from pipecompile.compiler.ir.graph import JointGraph, Phase
from pipecompile.compiler.ir.locality import Locality, locality_of
from pipecompile.compiler.ir.problem import Problem, fits, solution_of
from pipecompile.compiler.memory.rank_memory import RankMemory, Static, rank_memory
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.plan.decision import Decision
from pipecompile.compiler.planning import decide, planner
from pipecompile.compiler.planning.formulation import Grounds, Terms, formulate
from pipecompile.compiler.planning.planner import Planner
from pipecompile.compiler.report.compare import solution_in
from pipecompile.compiler.units import menus as menus_
from pipecompile.compiler.units.menus import options_of
from pipecompile.compiler.units.pricing import roofline
from pipecompile.compiler.units.stash import Body, Stash, bodies_of
from pipecompile.compiler.units.units import units_of
from pipecompile.passes.graph.placement import Placement, place
from pipecompile.passes.graph.remat import rematerialise
from pipecompile.passes.programs.lower import lower
from pipecompile.passes.schedule.load import Load
from support import models, units
from torch import fx

NOTHING = Static(0, 0, 0, 0, 0, 0, 0)


@cache
def graph() -> tuple[JointGraph, Locality]:
    found = units.captured(models.Residual(6, 64), torch.ones(256, 64))
    return found, locality_of(found)


@cache
def bodies() -> tuple[list[Body], dict[fx.Node, int]]:
    return bodies_of(*graph(), units_of(*graph(), H100))


def held(placement: Placement, again: Collection[fx.Node]) -> RankMemory:
    """What one stage holds for one microbatch, walked operator by operator."""
    joint, locality = graph()
    own, twin = joint.copy()
    stage = {twin[node]: s for node, s in placement.stage.items()}
    remat = rematerialise(own, locality.moved(twin), stage, {twin[node] for node in again})
    program = lower(own, remat.locality, remat.stage, 1)
    return rank_memory(program, from_text("0F0 0B0")[0], NOTHING)


def problem_of(menus: Sequence[Sequence[Stash]]) -> Problem:
    """One stage, one microbatch, weights that take nothing."""
    free = [[0.0] * len(menu) for menu in menus]
    terms = Terms((0,), 1, dict.fromkeys(graph()[0].params, 0), Load((1,), (((1,),),), 1.0))
    return formulate(Grounds(graph()[0], *bodies(), menus), free, H100, terms)


def test_prices_are_not_below_what_programs_hold() -> None:
    """Every unit keeps all that it can, or recomputes all that it can. One that forgets what it
    gave to the next is computed again while the next one's backward runs."""
    menus = options_of(*bodies(), H100)
    problem = problem_of(menus)
    assert sum(bool(menu[-1].forgets) for menu in menus) > 2
    home = {node: 0 for body in bodies()[0] for node in body.forward}
    placement = place(*graph(), home)
    for choice in itertools.product(*({0, len(menu) - 1} for menu in menus)):
        again = {n for menu, k in zip(menus, choice, strict=True) for n in menu[k].recomputed}
        (priced,) = problem.ranks_bytes((0,) * len(menus), choice)
        assert priced >= held(placement, again).peak_bytes, choice


def test_what_is_forgotten_waits_for_the_most_that_a_reader_needs() -> None:
    """The value is read by the backward of units 1 and 2, and by the forward of unit 3."""
    made = fx.Graph()
    value = made.placeholder("value")
    places = {value: 0}
    for unit, phase in ((1, Phase.BACKWARD), (2, Phase.BACKWARD), (3, Phase.FORWARD)):
        reader = made.call_function(torch.ops.aten.tanh.default, (value,))
        reader.meta["phase"] = phase
        places[reader] = unit

    def needs(*transient_bytes: int) -> tuple[Stash, ...]:
        return tuple(Stash(transient_bytes=n) for n in transient_bytes)

    menus = (needs(7), needs(30, 500), needs(40), needs(9000))
    forgetful = Stash(forgets=frozenset({value}), transient_bytes=7)
    assert menus_._with_readers(forgetful, menus, places).transient_bytes == 7 + 500
    keeping = Stash(transient_bytes=7)
    assert menus_._with_readers(keeping, menus, places) is keeping


# -- the planner ----------------------------------------------------------------------------------


class Drafts:
    """Programs that need so many bytes more than the walk says; all, or those that recompute
    nothing."""

    def __init__(self, hidden_bytes: int, keeping: bool = False) -> None:
        self.hidden_bytes, self.keeping = hidden_bytes, keeping
        self.peaks: list[int] = []

    def __call__(self, decision: Decision) -> list[RankMemory]:
        placement, again = decide.apply(decision, *graph())
        hidden = 0 if self.keeping and decision.recomputed else self.hidden_bytes
        self.peaks.append(held(placement, again).peak_bytes + hidden)
        return [RankMemory(NOTHING, self.peaks[-1], "0B0", ())]


def decided(budget_bytes: float, drafts: Drafts) -> tuple[Planner, Any]:
    joint, locality = graph()
    options = CompileOptions(n_stages=1, solver="dynamic")
    nothing = dict.fromkeys(joint.params, 0)
    made = Planner(joint, locality, options, H100, nothing, 1, 256, budget_bytes, {})
    return made, made.decide(drafts, roofline(made.bodies, made.menus))


def test_what_prices_miss_is_held_in_reserve() -> None:
    """By its price all can be kept, by its programs it cannot: the solver is told how much less
    there is, and what it then chooses fits."""
    everything = Drafts(200_000)
    _, kept = decided(1e12, everything)
    assert not kept.recomputed
    budget = everything.peaks[0] - 100_000
    drafts = Drafts(200_000)
    made, decision = decided(budget, drafts)
    assert drafts.peaks[0] > budget
    assert decision.recomputed
    assert min(drafts.peaks) <= budget
    assert made.solved is not None
    assert made.solved.reserve_bytes[0] > 0


def test_what_programs_were_refused_for_is_known_afterwards() -> None:
    """A strategy whose programs do not fit is not said to, as it would by those of the plan."""
    everything = Drafts(0)
    decided(1e12, everything)
    budget = everything.peaks[0] + 100_000
    made, decision = decided(budget, Drafts(200_000, keeping=True))
    assert decision.recomputed
    assert made.solved is not None
    assert made.asked is not None
    keeping = [0] * made.solved.n_units
    own = solution_in(made.solved, decision)
    needed = held(*decide.apply(decision, *graph())).peak_bytes
    reserve = made.solved.reserve_bytes[0] + needed - own.ranks_bytes[0]
    exact = replace(made.solved, reserve_bytes=(reserve,))
    assert fits(exact, solution_of(exact, keeping, keeping, ""))
    assert not fits(made.asked, solution_of(made.asked, keeping, keeping, ""))


def test_the_solver_is_asked_so_many_times_and_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that need ever more are never settled."""

    class Growing(Drafts):
        def __call__(self, *args: Any) -> list[RankMemory]:
            self.hidden_bytes += 10_000_000
            return super().__call__(*args)

    for attempts in (1, 3):
        monkeypatch.setattr(planner, "ATTEMPTS", attempts)
        drafts = Growing(0)
        with pytest.raises(MemoryBudgetError):
            decided(900_000, drafts)
        assert len(drafts.peaks) == attempts + 1

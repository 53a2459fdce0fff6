"""The order of a schedule that is searched: by seconds and bytes of the plan's own programs.

What microbatches in flight may take is

1f1b      what 1F1B would take, on the rank where that is most
2x1f1b    twice that
budget    all that ``memory`` leaves beside weights, gradients, states and what programs need while
          they run; found by trying, as the programs' true peaks tell
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ...passes.generators.shape import PipelineShape, StageCosts, usual_limits
from ...passes.schedule.limits import verify_held
from ...passes.schedule.load import timed
from ...passes.schedule.registry import ScheduleKind
from ...passes.sequencing.problem import allowed
from ..costs.timing import Timing
from ..ir.actions import Kind, Schedule
from ..ir.errors import OptionError
from ..ir.program import PipelineProgram
from ..memory.rank_memory import RankMemory, stage_holds

ATTEMPTS = 4  # to use what a budget leaves
CLOSE = 0.02  # of the budget: not worth another attempt

Peaks = Callable[[Schedule], Sequence[RankMemory]]
"""Compute actions -> memory of every rank, with all that is sent and exchanged."""


@dataclass(frozen=True)
class Searched:
    """A schedule, and what to say of it."""

    schedule: Schedule
    note: str


@dataclass(frozen=True)
class Ordering:
    """One search.

    Attributes:
        shape: with the programs' splits.
        rule: "1f1b", "2x1f1b", "budget" or "auto": "budget" where there is one, else "1f1b".
        budgets: of the ranks in bytes; empty for no limit.
    """

    kind: ScheduleKind
    shape: PipelineShape
    program: PipelineProgram
    timing: Timing
    peaks: Peaks
    rule: str = "auto"
    budgets: Sequence[float] = ()

    @cached_property
    def _compute_s(self) -> dict[tuple[int, Kind], float]:
        return self.timing.compute_s()

    def search(self) -> Searched:
        """The best order that is found.

        Raises:
            OptionError: a rank may hold less than one microbatch takes.
        """
        if self.rule == "budget" and not self._limited:
            raise OptionError(
                'schedule_memory="budget" has no effect where no memory= limits it: give one, or '
                'use "1f1b" or "2x1f1b"'
            )
        costs = self.costs()
        twice = self.rule == "2x1f1b"
        factor = 2 if twice else 1
        if not self.kind.takes_limit:  # its own is less
            factor = self.shape.ranks
        limits = [factor * each for each in usual_limits(self.shape, costs)]
        first = self._generated(costs, limits)
        if self.rule in ("budget", "auto") and self._limited:
            return Searched(self._filling(costs, limits, first), "in what the budget leaves")
        if self._limited and min(self._rooms(first)) < 0:
            return Searched(self.kind.order(self.shape), "as if all stages were alike")
        if not self.kind.takes_limit:
            return Searched(first, "by the stages' seconds")
        return Searched(first, f"in the memory of {'twice ' * twice}1f1b")

    def costs(self) -> StageCosts:
        """Of the programs."""
        held = [stage_holds(self.program, s) for s in range(self.shape.n_stages)]
        stash, carry = ([float(each[kind]) for each in held] for kind in (Kind.F, Kind.B))
        return StageCosts.of(self._compute_s, self.timing.transfer_s(), stash, carry)

    def _generated(self, costs: StageCosts, limits: Sequence[float]) -> Schedule:
        priced = replace(costs, limit_bytes=tuple(limits))
        made = self.kind.generate(replace(self.shape, costs=priced))
        verify_held(made, costs.stash_bytes, costs.carry_bytes, [allowed(each) for each in limits])
        return made

    def _filling(self, costs: StageCosts, limits: Sequence[float], first: Schedule) -> Schedule:
        """The fastest of several, each with limits that the one before lets hope for."""
        alike = self.kind.order(self.shape)  # what the planner has drafted
        best, best_s, schedule = alike, self._step_s(alike, costs), first
        for _ in range(ATTEMPTS):
            room = self._rooms(schedule)
            step_s = self._step_s(schedule, costs)
            if min(room) >= 0 and step_s < best_s:
                best, best_s = schedule, step_s
            shares = [each / budget for each, budget in zip(room, self.budgets, strict=True)]
            if 0 <= min(shares) <= CLOSE:
                break
            limits = [limit + each for limit, each in zip(limits, room, strict=True)]
            try:
                schedule = self._generated(costs, limits)
            except OptionError:  # less than one microbatch: nothing fits
                break
        return best

    @property
    def _limited(self) -> bool:
        return any(map(math.isfinite, self.budgets))

    def _rooms(self, schedule: Schedule) -> list[float]:
        """Per rank, what is left of its budget."""
        pairs = zip(self.budgets, self.peaks(schedule), strict=True)
        return [budget - each.needed_bytes for budget, each in pairs]

    def _step_s(self, schedule: Schedule, costs: StageCosts) -> float:
        send_s = self.timing.send_s()
        return timed(schedule, self.shape, self._compute_s, costs.transfer_s, send_s).step_s


def has_order(order: Schedule, shape: PipelineShape) -> bool:
    """Whether it is of as many microbatches, and of the same programs."""
    kinds = {(a.stage, a.kind) for actions in order for a in actions}
    longest = max((a.microbatch or 0 for actions in order for a in actions), default=-1)
    weights = all(((s, Kind.W) in kinds) == split for s, split in enumerate(shape.splits))
    return longest + 1 == shape.microbatches and weights

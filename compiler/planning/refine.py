"""After the solver: small changes of its solution that shorten the step as it is simulated.

The problem's objective is a formula: m of the slowest rank, what the schedule waits where all
stages are alike, transfers in full. The simulator knows which transfers hide behind computation,
and what stages that are not alike wait for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ...passes.generators.shape import PipelineShape, StageCosts, usual_limits
from ...passes.integer.work import Work
from ...passes.partition.baselines import most_even
from ...passes.schedule.load import far_of, linked
from ...passes.schedule.registry import ScheduleKind
from ...passes.schedule.simulate import Timeline, simulate
from ..costs.hardware import Device
from ..ir.actions import Kind, Schedule
from ..ir.errors import PartitionError
from ..ir.problem import Problem, Solution, fits, solution_of
from ..units.pricing import UnitPrices
from ..units.weights import WeightWork

LIMIT_S = 3.0  # for the search, counted
ACTION_S = 1e-5  # work: of an action that is simulated
LEAST_GAIN = 1e-3  # of the step: less is not worth another division
LEAST_S = 2e-4  # nor is less than launching some kernels takes, which no price knows
FEW = 4  # microbatches per stage that are simulated; more repeat them


Pairs = tuple[tuple[int, int], ...]
"""Messages: from a stage, to a stage."""


@dataclass(frozen=True)
class StepModel:
    """A step from a solution, without its programs.

    Attributes:
        prices, weights: of the problem's units.
        device: whose messages take what it says.
        stepping_bytes: that the optimizer of a replica moves, of all parameters; 0 for none.
        by_kind: the prices on each kind of device, where there are several.
        adds: per unit, seconds and launches in which its gradients are added to sums, where that
            counts.
    """

    problem: Problem
    kind: ScheduleKind
    shape: PipelineShape
    prices: Sequence[UnitPrices]
    weights: Sequence[WeightWork]
    device: Device
    stepping_bytes: float = 0.0
    by_kind: Sequence[Sequence[UnitPrices]] = ()
    adds: Sequence[tuple[float, int]] = ()

    @cached_property
    def few(self) -> PipelineShape:
        """With no more microbatches than it takes to see what repeats."""
        most = FEW * self.shape.n_stages
        return replace(self.shape, microbatches=min(self.shape.microbatches, most))

    @cached_property
    def _order(self) -> Schedule:
        return self.kind.order(self.few)

    @cached_property
    def _schedules(self) -> dict[Pairs, Schedule]:
        return {}

    def _linked(self, far: Pairs) -> Schedule:
        """The order with messages, some of them not between neighbours."""
        if far not in self._schedules:
            self._schedules[far] = linked(self._order, self.few, far)
        return self._schedules[far]

    @property
    def n_actions(self) -> int:
        """That are simulated for a step."""
        return sum(map(len, self._linked(())))

    def step_s(self, stage: Sequence[int], option: Sequence[int]) -> float:
        """Seconds of a step."""
        compute_s, transfer_s = self._compute_s(stage, option), self._transfer_s(stage)
        send_s = self.device.send_s(transfer_s, self.problem.homes)
        schedule = self._linked(far_of(transfer_s))
        return self._whole_s(simulate(schedule, compute_s, transfer_s, send_s=send_s), stage)

    def searched_s(self, stage: Sequence[int], option: Sequence[int]) -> float:
        """The same with the order that is found for just these stages, if orders are searched."""
        if not self.kind.searches:
            return self.step_s(stage, option)
        compute_s, transfer_s = self._compute_s(stage, option), self._transfer_s(stage)
        stash = self.problem.stages_stash(stage, option)
        costs = StageCosts.of(compute_s, transfer_s, stash, self._carry_bytes(stage))
        if self.kind.takes_limit:
            costs = replace(costs, limit_bytes=usual_limits(self.few, costs))
        order = self.kind.generate(replace(self.few, costs=costs))
        schedule = linked(order, self.few, far_of(transfer_s))
        send_s = self.device.send_s(transfer_s, self.problem.homes)
        return self._whole_s(simulate(schedule, compute_s, transfer_s, send_s=send_s), stage)

    def _whole_s(self, few: Timeline, stage: Sequence[int]) -> float:
        """Of all microbatches, from some."""
        rest = self.shape.microbatches - self.few.microbatches
        busy = max(few.busy_s(rank) for rank in range(self.few.ranks))
        return few.step_s + rest * busy / self.few.microbatches + self._closing_s(stage)

    def _compute_s(
        self, stage: Sequence[int], option: Sequence[int]
    ) -> dict[tuple[int, Kind], float]:
        found: dict[tuple[int, Kind], float] = defaultdict(float)
        launches: dict[tuple[int, Kind], float] = defaultdict(float)
        for unit, (work, s, k) in enumerate(zip(self.weights, stage, option, strict=True)):
            prices = self.by_kind[self.problem.kind_of(s)] if self.by_kind else self.prices
            forward, backward, again = prices[unit].of(k)
            part = work.part if self.shape.splits[s] else 0.0
            found[s, Kind.F] += forward
            found[s, Kind.B] += (1 - part) * backward + again
            found[s, Kind.W] += part * backward
            first, second = prices[unit].launches
            launches[s, Kind.F] += first
            launches[s, Kind.B] += (1 - part) * second + (first * again / forward if again else 0)
            launches[s, Kind.W] += part * second
        for (add_s, count), s in zip(self.adds, stage, strict=bool(self.adds)):
            kind = Kind.W if self.shape.splits[s] else Kind.B
            found[s, kind] += add_s
            launches[s, kind] += count
        return {
            (s, kind): self._on(s).program_s(found[s, kind], round(launches[s, kind]))
            for s in range(self.shape.n_stages)
            for kind in Kind
        }

    def _on(self, stage: int) -> Device:
        """The device of its rank."""
        return self.device.at(self.problem.homes[stage])

    def _carry_bytes(self, stage: Sequence[int]) -> list[float]:
        found = [0.0] * self.shape.n_stages
        for work, s in zip(self.weights, stage, strict=True):
            found[s] += work.carry_bytes if self.shape.splits[s] else 0.0
        return found

    def _transfer_s(self, stage: Sequence[int]) -> dict[tuple[int, int], float]:
        device, homes = self.device, self.problem.homes
        found: dict[tuple[int, int], float] = {}
        for value in self.problem.values:
            source = stage[value.source]
            for s in {stage[reader] for reader in value.readers} - {source}:
                bytes_per_s, latency_s = device.link(homes[source], homes[s])
                slower = device.link_bytes_per_s / bytes_per_s  # than in the problem
                found.setdefault((source, s), latency_s)
                found[source, s] += value.receive_s * slower
        return found

    def _held(self, stage: Sequence[int]) -> list[float]:
        """Bytes that each stage holds all the time."""
        problem = self.problem
        held = [0.0] * problem.n_stages
        for unit, s in enumerate(stage):
            held[s] += problem.options[unit][0].static_bytes
        for kept in problem.kept:
            if not kept.per_microbatch:
                for s in {stage[unit] for unit, _ in kept.users}:
                    held[s] += kept.bytes
        return held

    def _closing_s(self, stage: Sequence[int]) -> float:
        """The optimizer of the slowest rank, in proportion to what ranks hold."""
        if not self.stepping_bytes:
            return 0.0
        ranks, held = [0.0] * self.problem.n_ranks, self._held(stage)
        for s, size in enumerate(held):
            ranks[self.problem.homes[s]] += size
        part = self.stepping_bytes / (math.fsum(held) or 1.0)
        return max(self.device.at(r).moved_s(part * size) for r, size in enumerate(ranks))


def refine(
    model: StepModel, solution: Solution, limit_s: float = LIMIT_S
) -> tuple[Solution, float]:
    """A solution as good as this one or better, and the part of the step that it saves.

    Each change moves a unit (with its group) over the cut to the next stage, or has it take another
    option; where ranks or links are not alike also two units, as the cut between them may be worse
    than either of its neighbours. The first that helps is taken, until none does or as much has
    been simulated as takes an idle core ``limit_s``.
    """
    work, problem = Work(limit_s), model.problem
    before = best_s = model.step_s(solution.stage, solution.option)
    best = solution
    improved = True
    while improved and not work.over:
        improved = False
        for stage, option in _changes(problem, best):
            if work.over:
                break
            work.spend(ACTION_S * model.n_actions)
            step_s = model.step_s(stage, option)
            if step_s >= best_s * (1 - LEAST_GAIN / 10):
                continue
            found = _legal(problem, stage, option, solution)
            if found is not None:
                best, best_s, improved = found, step_s, True
                break
    if best is not solution:
        before, best_s = (model.searched_s(x.stage, x.option) for x in (solution, best))
    saved = 1 - best_s / before if before else 0.0
    worth = saved > LEAST_GAIN and before - best_s > LEAST_S
    return (best, saved) if worth else (solution, 0.0)


def smoothed(problem: Problem, solution: Solution) -> Solution:
    """Other runs of units with the same options, whose stages are as alike as they can be.

    The slowest stage decides about a division; how even the others are, nothing does. Where memory
    or the order of units forbids the most even one, the solution stays.
    """
    stage = most_even(problem, solution)
    return _legal(problem, stage, solution.option, solution) or solution


def _legal(
    problem: Problem, stage: Sequence[int], option: Sequence[int], like: Solution
) -> Solution | None:
    try:
        found = solution_of(problem, stage, option, like.solver, seconds=like.seconds)
    except PartitionError:
        return None
    if not fits(problem, found):
        return None
    return replace(found, bound=like.bound, proven=like.proven, note=like.note)


def _holding(
    moving: set[int], bound: Mapping[int, set[int]], stage: Sequence[int], step: int
) -> set[int]:
    """Units that may not stay where they are if some move by a stage."""
    near = {v for u in moving for v in bound[u]} - moving
    there = stage[next(iter(moving))] + step
    return {v for v in near if (stage[v] - there) * step < 0}


def _changes(
    problem: Problem, solution: Solution
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Neighbours of a solution, most of them legal."""
    group_of = {unit: group for group in problem.together for unit in group}
    after: dict[int, set[int]] = defaultdict(set)
    before: dict[int, set[int]] = defaultdict(set)
    for u, v in problem.edges:
        after[u].add(v)
        before[v].add(u)
    stage, option = solution.stage, solution.option
    for unit in range(problem.n_units):
        group = group_of.get(unit, (unit,))
        for step, bound in ((1, after), (-1, before)):
            there = stage[unit] + step
            if not 0 <= there < problem.n_stages or group[0] != unit:
                continue
            together = set(group)
            holds = _holding(together, bound, stage, step)
            if holds and not problem.alike and len({group_of.get(v, v) for v in holds}) == 1:
                together.update(*(group_of.get(v, (v,)) for v in holds))
                holds = _holding(together, bound, stage, step)
            if not holds:
                yield tuple(there if u in together else s for u, s in enumerate(stage)), option
    for unit, menu in enumerate(problem.options):
        for k in range(len(menu)):
            kind = problem.kind_of(stage[unit])
            if k != option[unit] and menu[k].on(kind) < menu[option[unit]].on(kind):
                yield stage, (*option[:unit], k, *option[unit + 1 :])

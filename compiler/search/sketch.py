"""A plan without programs: units divided at their prices, the schedule simulated.

What it leaves out are the programs: what they hold beyond the prices of units, what the order of a
searched schedule is for just these stages, what is launched. So its step is near that of the plan,
and takes a hundredth of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ...passes.generators.shape import PipelineShape
from ...passes.partition.solve import solve
from ...passes.schedule.communication import add_communication
from ...passes.schedule.forward_only import forward_only
from ...passes.schedule.load import Load, linked
from ...passes.schedule.registry import ScheduleKind
from ...passes.schedule.simulate import simulate
from ..costs.closing import compressed_s, parcels
from ..driver.work import Outline
from ..ir import shards
from ..ir.actions import Kind, Phase, Schedule
from ..ir.errors import MemoryBudgetError
from ..ir.problem import Solution
from ..ir.program import Message
from ..memory.footprint import Footprint
from ..planning import refine
from ..planning.planner import CLOSING, Planner
from ..planning.refine import StepModel
from ..units.pricing import UnitPrices, roofline
from ..units.weights import WeightWork, weight_works
from .bounds import Microbatch

QUICK_S = 1.0  # of the solver, counted
SLACK = 1.03  # of the budget: programs may need less than their prices say
DOUBTFUL = 1.5  # of the budget: where the nearest division is priced below this, its plan decides


@dataclass(frozen=True)
class Sketch:
    """What is expected of a plan.

    Attributes:
        step_s: with the optimizer.
        peak_bytes: of the fullest rank.
    """

    step_s: float
    bubble: float
    peak_bytes: float


class Prices:
    """Of one graph's units, for all ways that compute with it."""

    def __init__(self, outline: Outline):
        parts = outline.parts
        self.nodes = len(outline.graph.graph.nodes)
        self.units: Sequence[UnitPrices] = roofline(parts.bodies, parts.menus)
        device = outline.settings.rates
        self.weights: Sequence[WeightWork] = weight_works(parts.bodies, parts.places, device)

    @cached_property
    def microbatch(self) -> Microbatch:
        sums = [each.forward_s + each.backward_s + min(each.recompute_s) for each in self.units]
        forward = (
            each.forward_s / whole for each, whole in zip(self.units, sums, strict=True) if whole
        )
        return Microbatch(math.fsum(sums), max(sums, default=0.0), min(forward, default=0.0))


def sketch_of(outline: Outline, prices: Prices, devices: int) -> Sketch:
    """The best division by the prices, with recomputation, and its simulated step.

    Args:
        devices: of all replicas.

    Raises:
        MemoryBudgetError: none comes near to fitting by the prices.
        PartitionError: too few units for the stages.
    """
    settings = outline.settings
    options, m = settings.options, settings.microbatches
    footprint, device = settings.footprint, settings.rates
    shape = options.shape(m)
    splits = False, *shape.splits[1:]  # the first sends no gradients
    shape = replace(shape, splits=splits, rough=True)
    planner = Planner(
        outline.graph,
        outline.locality,
        options,
        device,
        outline.held_bytes,
        m,
        outline.rows,
        [budget * SLACK for budget in settings.budgets],
        {},
        outline.parts,
        load_for(options.kind, shape),
    )
    problem = planner.problem(prices.units)
    problem = replace(problem, reserve_bytes=(float(settings.batch_bytes * m),) * problem.n_ranks)
    try:
        found = solve(problem, time_limit_s=QUICK_S, solver="dynamic")
    except MemoryBudgetError as error:
        found = error.nearest
        if found is None or _doubtful(found, settings.budgets):
            raise
    read, grads = footprint.exchanged_bytes(outline.graph.copies)
    model = _Model(
        problem,
        options.kind,
        shape,
        prices.units,
        prices.weights,
        device,
        by_kind=tuple(planner.by_kind.values()),
        footprint=footprint,
        read_bytes=read,
        grad_bytes=grads,
        steps=options.optimizer is not None,
        clips=options.max_grad_norm is not None,
        trains=outline.graph.trains,
    )
    return model.expected(found, devices)


def _doubtful(found: Solution, budgets: Sequence[float]) -> bool:
    """Whether a rank is priced so far above its budget that no programs could fit."""
    pairs = zip(found.ranks_bytes, budgets, strict=True)
    return any(held > DOUBTFUL * budget for held, budget in pairs)


def shortened(kind: ScheduleKind, shape: PipelineShape) -> PipelineShape:
    """With so few microbatches that the others only repeat what these do.

    One round is like the next where they are whole; an order that is searched is less even.
    """
    rounds = not kind.searches and shape.microbatches % shape.ranks == 0
    most = refine.FEW * (shape.ranks if rounds else shape.n_stages)
    return replace(shape, microbatches=min(shape.microbatches, most))


def load_for(kind: ScheduleKind, shape: PipelineShape) -> Load:
    """Of few microbatches, where more of them hold as much and wait as long; else of all."""
    if not kind.searches and shape.microbatches % shape.ranks:
        return kind.load(shape)
    few = shortened(kind, shape)
    load = kind.load(few)
    return load if max(load.in_flight) < few.microbatches else kind.load(shape)


@lru_cache(8)  # levels of ZeRO are looked at one after the other
def _linked(kind: ScheduleKind, few: PipelineShape) -> Schedule:
    return linked(kind.order(few), few)


@dataclass(frozen=True)
class _Model(StepModel):
    """A step with what replicas exchange, by the share of the parameters that a stage holds.

    Attributes:
        read_bytes, grad_bytes: of all that is trained, as programs read it and its gradients.
        steps, clips: whether there is an optimizer, and clipping.
        trains: whether there is a backward.
    """

    footprint: Footprint | None = None
    read_bytes: int = 0
    grad_bytes: int = 0
    steps: bool = False
    clips: bool = False
    trains: bool = True

    @cached_property
    def few(self) -> PipelineShape:
        return shortened(self.kind, self.shape)

    @cached_property
    def _schedule(self) -> Schedule:
        if self.trains:
            return _linked(self.kind, self.few)
        pairs = ((s, s + 1) for s in range(self.few.n_stages - 1))
        messages = [Message(a, b, Phase.FORWARD, ()) for a, b in pairs]
        return add_communication(forward_only(self.few), messages)

    def _shares(self, stage: Sequence[int]) -> list[float]:
        """Per stage, of all that is held."""
        held = self._held(stage)
        whole = math.fsum(held) or 1.0
        return [each / whole for each in held]

    def _held(self, stage: Sequence[int]) -> list[float]:
        problem = self.problem
        held = [0.0] * problem.n_stages
        for unit, s in enumerate(stage):
            held[s] += problem.options[unit][0].static_bytes
        for kept in problem.kept:
            if not kept.per_microbatch:
                for s in {stage[unit] for unit, _ in kept.users}:
                    held[s] += kept.bytes
        return held

    def _compute_s(
        self, stage: Sequence[int], option: Sequence[int]
    ) -> dict[tuple[int, Kind], float]:
        """From level 2 of ZeRO on gradients leave, and at level 3 parameters come, beside it."""
        found = super()._compute_s(stage, option)
        assert self.footprint is not None
        dp, zero = self.footprint.dp, self.footprint.zero
        if dp == 1 or not zero.streams:
            return found
        for s, share in enumerate(self._shares(stage)):
            brought = self.read_bytes * share if zero.divides_params else 0.0
            last = Kind.W if self.shape.splits[s] else Kind.B
            for kind in (Kind.F, Kind.B, Kind.W):
                sent = brought + (self.grad_bytes * share if kind is last else 0.0)
                if found[s, kind]:
                    parts = len(parcels(sent))
                    beside_s = self.device.collective_s(sent, dp, parts) if parts else 0.0
                    found[s, kind] = self.device.together_s(found[s, kind], beside_s)
        return found

    def _closing_s(self, stage: Sequence[int]) -> float:
        held, homes = self._held(stage), self.problem.homes
        whole = math.fsum(held) or 1.0
        ranks = range(self.problem.n_ranks)
        return max(
            self._closed_s(
                math.fsum(b for b, home in zip(held, homes, strict=True) if home == r), whole
            )
            for r in ranks
        )

    def _closed_s(self, held: float, whole: float) -> float:
        """Of a rank that holds so much of the whole."""
        assert self.footprint is not None
        dp, zero = self.footprint.dp, self.footprint.zero
        read, grads = (size * held / whole for size in (self.read_bytes, self.grad_bytes))
        sizes = [*parcels(grads), *parcels(grads)]
        brought = parcels(read) if zero.unshards else []
        if zero.divides_states:
            sizes = [min(grads, shards.PARCEL_BYTES), *brought]
        exchange_s = 0.0
        if (needs := self.footprint.compressed(None, ())).messages:
            exchange_s = compressed_s(needs, dp, self.device, held / whole)
            rest = self.footprint.as_they_are(None, ()) * held / whole
            sizes = [*parcels(rest), *parcels(rest), *brought]
        exchange_s += self.device.collective_s(sum(sizes), dp, len(sizes)) if dp > 1 else 0.0
        clipped = 3 * grads / (dp if zero.streams else 1) if self.clips else 0.0
        stepped = CLOSING * held if self.steps else 0.0
        return exchange_s + self.device.moved_s(clipped + stepped)

    def expected(self, found: Solution, devices: int) -> Sketch:
        """Of a division; the bubble is the share of the ranks' time in which they wait, as
        `Timeline.bubble` has it.

        Args:
            devices: of all replicas.
        """
        compute_s = self._compute_s(found.stage, found.option)
        transfer_s = self._transfer_s(found.stage)
        send_s = self.device.send_s(transfer_s, self.problem.homes)
        few = simulate(self._schedule, compute_s, transfer_s, send_s=send_s)
        step_s = self._whole_s(few, found.stage) * self.device.waiting(devices)
        busy = [few.busy_s(rank) for rank in range(self.few.ranks)]
        times = self.shape.microbatches / self.few.microbatches
        span = few.makespan_s + (times - 1) * max(busy)
        bubble = 1 - times * math.fsum(busy) / (span * len(busy)) if span else 0.0
        return Sketch(step_s, bubble, max(found.ranks_bytes))

"""A plan without programs: units divided at their prices, the schedule simulated.

What it leaves out are the programs: what they hold beyond the prices of units, what the order of a
searched schedule is for just these stages, what fusions compute again. So its step is near that of
the plan, and takes a hundredth of the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ...passes.generators.shape import PipelineShape
from ...passes.schedule.communication import add_communication
from ...passes.schedule.forward_only import forward_only
from ...passes.schedule.limits import peaks_held
from ...passes.schedule.load import Load, far_of, linked
from ...passes.schedule.registry import ScheduleKind
from ...passes.schedule.simulate import simulate
from ..compression.sizes import Needs
from ..costs.closing import compressed_s, parcels
from ..driver.work import Outline
from ..ir import shards
from ..ir.actions import Kind, Phase, Schedule
from ..ir.graph import nbytes
from ..ir.problem import Solution
from ..ir.program import Message
from ..memory.footprint import Footprint
from ..planning import refine
from ..planning.planner import Planner
from ..planning.refine import Pairs, StepModel
from ..tensors.facts import short_name
from ..units.pricing import UnitPrices, roofline
from ..units.weights import WeightWork, weight_works
from .bounds import Microbatch
from .divisions import SLACK, divided, roughly_divided

KEPT_STEPS = 4  # parts that are told apart of what is kept whole over a step


Part = tuple[float, float]
"""Of what a stage reads, and of its gradients, the parts that are kept whole over a step."""
Parts = Sequence[Part]
Bytes = Sequence[float]


@dataclass(frozen=True)
class Sketch:
    """What is expected of a plan.

    Attributes:
        step_s: with the optimizer.
        peak_bytes: of the fullest rank.
        rough: memory was taken more lightly than it is: the sketch of the same way that is not
            takes about as long or longer, or there is none.
    """

    step_s: float
    bubble: float
    peak_bytes: float
    rough: bool = False


class Prices:
    """Of one graph's units, for all ways that compute with it."""

    def __init__(self, outline: Outline):
        parts = outline.parts
        self.nodes = len(outline.graph.graph.nodes)
        self.units: Sequence[UnitPrices] = roofline(parts.bodies, parts.menus)
        device = outline.settings.rates
        self.weights: Sequence[WeightWork] = weight_works(parts.bodies, parts.places, device)
        self.adds = _adds(outline)

    @cached_property
    def microbatch(self) -> Microbatch:
        sums = [each.forward_s + each.backward_s + min(each.recompute_s) for each in self.units]
        forward = (
            each.forward_s / whole for each, whole in zip(self.units, sums, strict=True) if whole
        )
        return Microbatch(math.fsum(sums), max(sums, default=0.0), min(forward, default=0.0))


def _adds(outline: Outline) -> Sequence[tuple[float, int]]:
    """As `StepModel` has them: by a device's table, as plans count them."""
    device, parts = outline.settings.rates, outline.parts
    if device.table is None:
        return ()
    found = [(0.0, 0)] * len(parts.units)
    for node in outline.graph.grads.values():
        if (unit := parts.places.get(node)) is not None:
            dtype = short_name(node.meta["val"].dtype)
            seconds, count = found[unit]
            found[unit] = seconds + device.kernel_s(0, 3 * nbytes(node), dtype), count + 1
    return found


def sketch_of(outline: Outline, prices: Prices, devices: int, *, rough: bool = False) -> Sketch:
    """The best division by the prices, with recomputation, and its simulated step.

    Args:
        devices: of all replicas.
        rough: in one go. Each of several stages of a rank may have all of its memory, and what
            weight gradients that are split off wait with is left out.

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
    read, grads = footprint.exchanged_bytes(outline.graph.copies)
    model = _Model(
        problem,
        options.kind,
        shape,
        prices.units,
        prices.weights,
        device,
        by_kind=tuple(planner.by_kind.values()),
        adds=prices.adds,
        footprint=footprint,
        read_bytes=read,
        grad_bytes=grads,
        stepping_bytes=footprint.stepping_bytes(outline.graph.copies),
        clips=options.max_grad_norm is not None,
        trains=outline.graph.trains,
    )
    rough = rough and (problem.shares_ranks or model.puts_off)
    if rough:
        found = roughly_divided(problem, settings.budgets)
    else:
        found = divided(problem, settings.budgets, model.carried_bytes if model.puts_off else None)
    rooms = zip(settings.budgets, found.ranks_bytes, strict=True)
    spare = [max(0.0, budget - held) for budget, held in rooms] if settings.keeps else []
    sketch = model.expected(found, devices, spare)
    most = max(settings.budgets) if rough else math.inf
    return replace(sketch, peak_bytes=min(sketch.peak_bytes, most), rough=rough)


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
def _ordered(kind: ScheduleKind, few: PipelineShape) -> Schedule:
    return kind.order(few)


@lru_cache(8)
def _with_messages(kind: ScheduleKind, few: PipelineShape, far: Pairs) -> Schedule:
    return linked(_ordered(kind, few), few, far)


@dataclass(frozen=True)
class _Model(StepModel):
    """A step with what replicas exchange, by the share of the parameters that a stage holds.

    Attributes:
        read_bytes, grad_bytes: of all that is trained, as programs read it and its gradients.
        clips: whether there is clipping.
        trains: whether there is a backward.
    """

    footprint: Footprint | None = None
    read_bytes: int = 0
    grad_bytes: int = 0
    clips: bool = False
    trains: bool = True

    @cached_property
    def few(self) -> PipelineShape:
        return shortened(self.kind, self.shape)

    @property
    def puts_off(self) -> bool:
        """Whether gradients of weights are split off."""
        return self.trains and any(self.shape.splits)

    def _linked(self, far: Pairs) -> Schedule:
        if self.trains:
            return _with_messages(self.kind, self.few, far)
        pairs = ((s, s + 1) for s in range(self.few.n_stages - 1))
        messages = [Message(a, b, Phase.FORWARD, ()) for a, b in (*pairs, *far)]
        return add_communication(forward_only(self.few), messages)

    def carried_bytes(self, found: Solution) -> list[float]:
        """Per rank, what microbatches hold beyond what the problem knows of.

        It knows of what they keep from their forward to the end of their backward. Where that is
        split, they keep what gradients of weights read from its first part on, some of which was
        computed again for it.
        """
        stash = self.problem.stages_stash(found.stage, found.option)
        order = _ordered(self.kind, self.few)
        held = peaks_held(order, stash, self._carry_bytes(found.stage))
        known = self.problem.ranks_stash(found.stage, found.option)
        return [a - b for a, b in zip(held, known, strict=True)]

    def _shares(self, stage: Sequence[int]) -> list[float]:
        """Per stage, of all that is held."""
        held = self._held(stage)
        whole = math.fsum(held) or 1.0
        return [each / whole for each in held]

    def _exchanging(
        self, alone_s: Mapping[tuple[int, Kind], float], shares: Sequence[float], kept: Parts
    ) -> tuple[dict[tuple[int, Kind], float], list[float]]:
        """Of (stage, kind) with what replicas exchange beside it, and per stage by what the last
        microbatch takes longer.

        From level 2 of ZeRO on gradients leave, and at level 3 parameters come, with every
        microbatch; gradients that are whole leave with the last one.

        Args:
            alone_s: with no exchange.
        """
        found, late_s = dict(alone_s), [0.0] * len(shares)
        zero = self._footprint.zero
        if self._footprint.dp == 1 or not zero.divides_states:
            return found, late_s
        sends = zero.streams or not self._needs.messages
        for s, (share, (params, grads)) in enumerate(zip(shares, kept, strict=True)):
            brought = self.read_bytes * share * (1 - params) if zero.divides_params else 0.0
            sent = self.grad_bytes * share if sends else 0.0
            every = sent * (1 - grads) if zero.streams else 0.0
            last = Kind.W if self.shape.splits[s] else Kind.B
            for kind in (Kind.F, Kind.B, Kind.W):
                if not (one := alone_s[s, kind]):
                    continue
                found[s, kind] = self._beside_s(one, brought + (every if kind is last else 0.0))
                if kind is last and sent > every:
                    late_s[s] = self._beside_s(one, brought + sent) - found[s, kind]
        return found, late_s

    def _beside_s(self, alone_s: float, sent: float) -> float:
        if not (count := len(parcels(sent))):
            return alone_s
        beside_s = self.device.collective_s(sent, self._footprint.dp, count)
        return self.device.together_s(alone_s, beside_s)

    @property
    def _footprint(self) -> Footprint:
        assert self.footprint is not None
        return self.footprint

    @cached_property
    def _needs(self) -> Needs:
        return self._footprint.compressed(None, ())

    def _closed_s(self, rank: int, held: float, whole: float, kept: float, late_s: float) -> float:
        """Of a rank that holds so much of the whole.

        Args:
            kept: of what it reads, the part that is kept whole.
        """
        dp, zero, device = self._footprint.dp, self._footprint.zero, self.device.at(rank)
        part = held / whole
        read, grads = self.read_bytes * part, self.grad_bytes * part
        sizes = [*parcels(grads), *parcels(grads)]
        brought = parcels(read if zero.unshards else read * kept)
        if zero.divides_states:
            sizes = [min(grads, shards.parcel_bytes(int(grads))), *brought]
        exchange_s = late_s
        if self._needs.messages:
            exchange_s += compressed_s(self._needs, dp, device, part)
            rest = self._footprint.as_they_are(None, ()) * part
            sizes = [*parcels(rest), *parcels(rest), *(brought if zero.divides_states else ())]
        exchange_s += device.collective_s(sum(sizes), dp, len(sizes)) if dp > 1 else 0.0
        clipped = 3 * grads / (dp if zero.divides_states else 1) if self.clips else 0.0
        return exchange_s + device.moved_s(clipped + self.stepping_bytes * part)

    def _keeping(
        self, alone_s: Mapping[tuple[int, Kind], float], shares: Sequence[float], spare: Bytes
    ) -> Parts:
        """Per stage, which parts of its parameters and gradients to keep whole over a step, as far
        as its share of what its rank has to spare goes."""
        zero, dp, m = self._footprint.zero, self._footprint.dp, self.shape.microbatches
        homes, kept = self.problem.homes, [(0.0, 0.0)] * len(shares)

        def seconds(s: int, parts: Part) -> float:
            tried = [*kept[:s], parts, *kept[s + 1 :]]
            found, late_s = self._exchanging(alone_s, shares, tried)
            brought = parcels(self.read_bytes * shares[s] * parts[0])
            once_s = self.device.collective_s(sum(brought), dp, len(brought)) if brought else 0.0
            return m * sum(found[s, k] for k in (Kind.F, Kind.B, Kind.W)) + late_s[s] + once_s

        for s, share in enumerate(shares):
            own = math.fsum(x for x, home in zip(shares, homes, strict=True) if home == homes[s])
            left = spare[homes[s]] * share / own if own else 0.0
            for place, whole, divides in (
                (0, self.read_bytes * share, zero.divides_params),
                (1, self.grad_bytes * share, zero.streams),
            ):
                most = min(1.0, left / (whole * (1 - 1 / dp))) if divides and whole else 0.0
                tried = [most * n / KEPT_STEPS for n in range(KEPT_STEPS + 1)] if most else [0.0]
                ways = [(x, kept[s][1]) if place == 0 else (kept[s][0], x) for x in tried]
                kept[s] = min(ways, key=lambda parts: seconds(s, parts))
                left -= kept[s][place] * whole * (1 - 1 / dp)
        return kept

    def expected(self, found: Solution, devices: int, spare: Bytes = ()) -> Sketch:
        """Of a division; the bubble is the share of the ranks' time in which they wait, as
        `Timeline.bubble` has it.

        Args:
            devices: of all replicas.
            spare: per rank, bytes that may be used to exchange less; empty for none.
        """
        stage = found.stage
        alone_s, shares = self._compute_s(stage, found.option), self._shares(stage)
        nothing = [(0.0, 0.0)] * len(shares)
        sketches = [self._sketched(found, devices, alone_s, shares, nothing)]
        if spare and (kept := self._keeping(alone_s, shares, spare)) != nothing:
            sketches.append(self._sketched(found, devices, alone_s, shares, kept))
        return min(sketches, key=lambda sketch: sketch.step_s)

    def _sketched(
        self,
        found: Solution,
        devices: int,
        alone_s: Mapping[tuple[int, Kind], float],
        shares: Sequence[float],
        kept: Parts,
    ) -> Sketch:
        stage, homes = found.stage, self.problem.homes
        compute_s, late_s = self._exchanging(alone_s, shares, kept)
        transfer_s = self._transfer_s(stage)
        send_s = self.device.send_s(transfer_s, homes)
        schedule = self._linked(far_of(transfer_s))
        few = simulate(schedule, compute_s, transfer_s, send_s=send_s)
        busy = [few.busy_s(rank) for rank in range(self.few.ranks)]
        more = self.shape.microbatches - self.few.microbatches
        closing_s, held = [], self._held(stage)
        whole, added = math.fsum(held) or 1.0, [0.0] * self.problem.n_ranks
        for rank in range(self.problem.n_ranks):
            mine = [s for s, home in enumerate(homes) if home == rank]
            own = math.fsum(held[s] for s in mine)
            parts = math.fsum(shares[s] * kept[s][0] for s in mine) / (own / whole) if own else 0.0
            late = math.fsum(late_s[s] for s in mine)
            closing_s.append(self._closed_s(rank, own, whole, parts, late))
            spared = 1 - 1 / self._footprint.dp
            for s in mine:
                sizes = self.read_bytes * kept[s][0] + self.grad_bytes * kept[s][1]
                added[rank] += spared * shares[s] * sizes
        step_s = few.step_s + more * max(busy) / self.few.microbatches + max(closing_s)
        times = self.shape.microbatches / self.few.microbatches
        span = few.makespan_s + (times - 1) * max(busy)
        bubble = 1 - times * math.fsum(busy) / (span * len(busy)) if span else 0.0
        peak = max(map(sum, zip(found.ranks_bytes, added, strict=True)))
        return Sketch(step_s * self.device.waiting(devices), bubble, peak)

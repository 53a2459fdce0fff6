"""Drives the passes: a batch's shape in, stage programs, schedule and plan out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ...passes.graph.attention import restore_attention
from ...passes.graph.autocast import insert_casts
from ...passes.graph.casts import settle_casts
from ...passes.graph.placement import (
    Placement,
    Site,
    follow,
    sites_of,
)
from ...passes.programs.verify import verify_graph
from ..capture.batch import BatchSpec
from ..capture.capture import (
    Captured,
    ForwardPass,
    capture_evaluation,
    capture_forward,
    capture_training,
)
from ..capture.skeleton import Skeleton
from ..costs.footprint import Footprint
from ..costs.memory import StageMemory
from ..costs.optimizer_cost import optimizer_seconds
from ..costs.simulate import Timeline
from ..ir.actions import Schedule
from ..ir.errors import (
    BatchError,
    CaptureError,
    LossError,
    MemoryBudgetError,
    PlanError,
)
from ..ir.graph import (
    JointGraph,
    Phase,
    module_of,
    phase_of,
)
from ..ir.locality import Locality, locality_of
from ..ir.problem import Problem
from ..ir.program import PipelineProgram
from ..ir.shards import PARCEL_BYTES
from ..options.options import CompileOptions, choose_microbatches
from ..plan.decision import Decision, Search
from ..plan.plan import Plan
from ..planning import decide
from ..planning.planner import Planner
from ..planning.pricing import UnitPrices, measured_prices, roofline
from ..planning.stash import Body, Stash
from ..planning.target import Target
from ..planning.team import Alone, Team
from .assembly import Assembler, Assembly
from .record import Recorder
from .summary import Summary


class Mode(StrEnum):
    """What a program is for."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    FORWARD = "forward"


@dataclass(frozen=True)
class Compiled:
    """One graph, lowered and scheduled.

    Attributes:
        rebuild: puts the results back into the structure that the model returns (FORWARD).
        batch_dims: per result, the dimension along which microbatches are joined (FORWARD).
        timeline: the simulated step.
    """

    program: PipelineProgram
    schedule: Schedule
    plan: Plan
    rebuild: Callable[[list[torch.Tensor]], Any]
    batch_dims: tuple[int | None, ...]
    timeline: Timeline


def divide(
    spec: BatchSpec,
    options: CompileOptions,
    replicas: int,
    ragged: bool = False,
    finer: int = 1,
) -> tuple[BatchSpec, int]:
    """The spec of one microbatch, and the number of them per replica.

    Args:
        spec: of a batch that is cut over ``replicas`` first.
        ragged: take fewer microbatches where the rows do not divide, instead of refusing.
        finer: take so many times as many microbatches; where the options give their number, and
            where there are too few rows, that is refused.

    Raises:
        BatchError: it cannot be cut into equal parts.
    """
    if spec.rows % replicas:
        raise BatchError(
            f"a batch of {spec.rows} rows cannot be cut over dp={replicas} replicas: "
            f"use a multiple of {replicas} rows"
        )
    rows = spec.rows // replicas
    microbatches = options.microbatches or choose_microbatches(rows, options.n_stages)
    if finer > 1:
        if options.microbatches is not None:
            raise BatchError(f"microbatches={options.microbatches} is given")
        microbatches *= finer
    if ragged:
        microbatches = max(d for d in range(1, microbatches + 1) if rows % d == 0)
    if rows % microbatches:
        raise BatchError(
            f"a replica's batch of {rows} rows cannot be cut into microbatches={microbatches} of "
            f"equal size: use a multiple of {microbatches} rows, or another number of microbatches"
        )
    return spec.cut(replicas * microbatches), microbatches


class Builder:
    """Compiles the graphs of one model. The first graph decides the stages; others follow it.

    Args:
        why: how the number of stages was chosen, where it was: a note in the plan.

    Attributes:
        homes: parameter FQN -> the stages that hold it; empty before the first graph.
        zero: what replicas divide among themselves; settled by the first graph.
        problem: the partitioning problem that this process solved, if it did.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        options: CompileOptions,
        target: Target,
        team: Team | None = None,
        why: str = "",
    ):
        self.skeleton, self.options, self.target = skeleton, options, target
        self.team: Team = team or Alone()
        self.precision = options.dtypes
        self.levels = options.zero_levels
        self._set_zero(self.levels[0])
        self.sites: dict[Site, int] = {}
        self.again: frozenset[Site] = frozenset()
        self.homes: dict[str, tuple[int, ...]] = {}
        self.problem: Problem | None = None
        self.measured_s: list[float] | None = None
        self.why = why
        self.given = (
            Plan.load(options.plan) if isinstance(options.plan, str | Path) else options.plan
        )

    def _set_zero(self, level: int) -> None:
        self.zero = level
        self.options = replace(self.options, zero=level)
        self.footprint = Footprint(
            self.skeleton.module, self.options.optimizer, self.precision, self.options.dp, level
        )

    def build(
        self,
        mode: Mode,
        spec: BatchSpec,
        microbatches: int,
        dump: bool = True,
        batch: Sequence[torch.Tensor] = (),
    ) -> Compiled:
        """Compile one mode for one microbatch shape.

        The stages are chosen for training where the model can train on such a batch, also when
        something else is compiled first.

        Args:
            spec: of one microbatch.
            dump: write the files that ``dump_dir`` asks for (one rank does).
            batch: leaves of one microbatch, to measure with.
        """
        if not self.homes and mode is not Mode.TRAIN:
            with contextlib.suppress(LossError, CaptureError):
                self.build(Mode.TRAIN, spec, microbatches, dump=False, batch=batch)
        recorder = Recorder(self._folder(mode, spec) if dump else None)
        if self.why:
            with recorder.record("stages") as outcome:
                outcome.note = self.why
        with recorder.record("capture") as outcome:
            captured = self._capture(mode, spec)
            graph = captured.graph
            verify_graph(graph)
            counts = f"{len(list(graph.ops()))} operators, {len(graph.params)} parameters"
            outcome.note = "; ".join((counts, *captured.notes))
            outcome.texts[".py"] = lambda: graph.module.code
        if mixed := self.options.mixed:
            with recorder.record("precision") as outcome:
                outcome.note = f"{mixed}: {settle_casts(graph, mixed.compute)}"
                verify_graph(graph)
                outcome.texts[".py"] = lambda: graph.module.code
        chosen = ""
        with recorder.record("partition") as outcome:
            locality = locality_of(graph)
            if self.homes:
                decision, placement, again = self._follow(graph, locality)
            else:
                decision, chosen = self._decide_all(graph, locality, spec, microbatches, batch)
                placement, again = decide.apply(decision, graph, locality)
            outcome.note = _placement_note(decision)
            outcome.texts[".txt"] = partial(_placement_text, decision, locality)
        if chosen:
            with recorder.record("zero") as outcome:
                outcome.note = chosen
        assembler = self._assembler(microbatches, spec)
        assembly = assembler.assemble(graph, locality, placement, again, recorder)
        first = not self.homes
        if first and self.given is None:
            decision = self._corrected(decision, assembly.whole, batch)
        self._settle(assembly, placement, again, locality)
        summary = Summary(
            self.skeleton,
            self.options,
            self.target.spec,
            self.footprint,
            placement,
            assembly,
            decision,
            self._closing_s(assembly, first),
            self.given.costs if self.given else "profile" if self.target.profiler else "roofline",
        )
        timeline = summary.timeline()
        budget = self.target.budget_bytes
        limit = None if math.isinf(budget) else int(budget)
        plan = summary.plan(spec, microbatches, limit, timeline, recorder.records)
        if recorder.folder is not None:
            plan.save(recorder.folder / "plan.json")
        return Compiled(
            assembly.program,
            assembly.schedule,
            plan,
            captured.rebuild,
            captured.batch_dims,
            timeline,
        )

    def _folder(self, mode: Mode, spec: BatchSpec) -> Path | None:
        if self.options.dump_dir is None:
            return None
        shape = "x".join(str(n) for n in spec.leaves[0].shape)
        return Path(self.options.dump_dir) / f"{mode}-{shape}"

    def _capture(self, mode: Mode, spec: BatchSpec) -> Captured:
        passes: tuple[ForwardPass, ...] = (restore_attention,)
        device, compute = self.target.device, None
        if mixed := self.options.mixed:
            compute = mixed.compute
            casting = partial(insert_casts, precision=mixed, table=self.target.kind)
            passes = (*passes, casting)
        if mode is Mode.FORWARD:
            return capture_forward(self.skeleton, spec, device, passes, compute)
        capture = capture_training if mode is Mode.TRAIN else capture_evaluation
        return capture(self.skeleton, spec, self.options.loss_fn, device, passes, compute)

    def _assembler(self, microbatches: int, spec: BatchSpec) -> Assembler:
        options, device = self.options, self.target.kind
        return Assembler(options, self.footprint, microbatches, spec.nbytes, device)

    # -- the first graph ----------------------------------------------------------------------

    def _decide_all(
        self,
        graph: JointGraph,
        locality: Locality,
        spec: BatchSpec,
        microbatches: int,
        batch: Sequence[torch.Tensor],
    ) -> tuple[Decision, str]:
        """The decision at the lowest level of ZeRO at which there is one, and why that level.

        Raises:
            MemoryBudgetError: none fits at the highest.
        """
        self.team.agree(graph.fingerprint())
        levels, failures = self.levels, []
        for level in levels:
            self._set_zero(level)
            if self.given is not None:
                return self._from_plan(self.given, graph, spec, microbatches), ""
            try:
                decision = self._decide(graph, locality, spec, microbatches, batch)
            except MemoryBudgetError as error:
                if level == levels[-1]:
                    raise
                failures.append(f"at {level} {str(error).partition(':')[0]}")
            else:
                why = "; ".join(failures) or "everything fits undivided"
                return decision, f"zero={level}: {why}" if len(levels) > 1 else ""
        raise AssertionError("there is a level to try")

    def _decide(
        self,
        graph: JointGraph,
        locality: Locality,
        spec: BatchSpec,
        microbatches: int,
        batch: Sequence[torch.Tensor],
    ) -> Decision:
        assembler = self._assembler(microbatches, spec)
        planner = Planner(
            graph,
            locality,
            self.options,
            self.target.spec,
            self.footprint.held_bytes(graph.copies),
            assembler.in_flight(self.options.schedule == "zb_h1"),
            microbatches,
            spec.rows,
            self.target.budget_bytes,
            self._pinned(graph, locality),
        )
        prices = self._prices(graph, locality, planner.bodies, planner.menus, batch)

        def draft(placement: Placement, again: Collection[fx.Node]) -> Sequence[StageMemory]:
            assembly = assembler.assemble(graph, locality, placement, again, Recorder(None))
            assembly.take_apart()
            return assembly.memory

        decision = self.team.share(lambda: planner.decide(draft, prices))
        self.problem = planner.solved
        return decision

    def _from_plan(
        self, plan: Plan, graph: JointGraph, spec: BatchSpec, microbatches: int
    ) -> Decision:
        """The decision of a plan that was made for just this.

        Raises:
            PlanError: it was made for something else.
        """
        options = self.options
        wanted = {
            "n_stages": (plan.n_stages, options.n_stages),
            "dp": (plan.dp, options.dp),
            "microbatches": (plan.microbatches, microbatches),
            **{name: (plan.options.get(name), ours) for name, ours in options.in_plan().items()},
        }
        for name, (theirs, ours) in wanted.items():
            if theirs != ours:
                raise PlanError(f"the plan has {name}={theirs}, this run {name}={ours}")
        if plan.fingerprint != graph.fingerprint():
            what = (
                f"microbatches of ({plan.shape}), this run has ({spec})"
                if plan.shape != str(spec)
                else "another model, or the same one with other settings or library versions"
            )
            raise PlanError(f"the plan was made for {what}: make a new plan")
        return plan.decision

    def _prices(
        self,
        graph: JointGraph,
        locality: Locality,
        bodies: Sequence[Body],
        menus: Sequence[Sequence[Stash]],
        batch: Sequence[torch.Tensor],
    ) -> Sequence[UnitPrices]:
        profiler = self.target.profiler
        if profiler is None:
            return roofline(bodies, menus)
        return measured_prices(graph, locality, bodies, menus, profiler, batch, self.team.pool)

    def _pinned(self, graph: JointGraph, locality: Locality) -> dict[fx.Node, int]:
        module = self.skeleton.module
        names = {name for name, _ in module.named_modules()} | set(self.skeleton.canonical)
        pin = {self.skeleton.canonical.get(n, n): s for n, s in (self.options.pin or {}).items()}
        return decide.pinned_nodes(graph, locality, pin, names)

    def _corrected(
        self, decision: Decision, program: PipelineProgram, batch: Sequence[torch.Tensor]
    ) -> Decision:
        """With the units' seconds scaled to what their stages take when they run as a whole."""
        profiler = self.target.profiler
        if profiler is None or not program.trains:
            return decision
        mine = self.team.stages(self.options.n_stages)
        times = profiler.times([program.stages[s] for s in mine], batch)
        measured = {s: (t.forward_s, t.backward_s) for s, t in zip(mine, times, strict=True)}
        return decision.scaled(self.team.pool_stages(measured))

    # -- the others ---------------------------------------------------------------------------

    def _follow(
        self, graph: JointGraph, locality: Locality
    ) -> tuple[Decision, Placement, frozenset[fx.Node]]:
        """Stages and recomputation as in the first graph, operator by operator."""
        placement = follow(graph, locality, self.sites, self.homes)
        again = frozenset(n for n, s in sites_of(locality) if s in self.again and graph.trains)
        stages = [placement.stage[n] for n in locality.staged if phase_of(n) is Phase.FORWARD]
        search = Search(0.0, 0.0, True, "the first graph")
        names = tuple(sorted(node.name for node in again))
        ones = (1,) * len(stages)
        labels = ("nothing",) * len(stages)
        made = Decision(graph.fingerprint(), ones, tuple(stages), labels, (), names, search)
        return made, placement, again

    def _settle(
        self,
        assembly: Assembly,
        placement: Placement,
        again: Collection[fx.Node],
        locality: Locality,
    ) -> None:
        """Remember the first graph's decisions; a parameter that nothing reads lives on stage 0."""
        if self.homes:
            return
        self.sites = placement.sites
        self.again = frozenset(site for node, site in sites_of(locality) if node in again)
        for name in self.skeleton.params:
            holders = tuple(p.stage for p in assembly.program.stages if name in p.params)
            self.homes[name] = holders or (0,)

    # -- what it takes ------------------------------------------------------------------------

    def _closing_s(self, assembly: Assembly, first: bool) -> list[float]:
        """Seconds per stage after the last microbatch: gradients reduced, parameters stepped."""
        if self.given is not None and first:
            return [stage.closing_s for stage in self.given.stages]
        if not assembly.program.trains:
            return [0.0] * self.options.n_stages
        pairs = zip(self._optimizer_s(assembly), assembly.memory, strict=True)
        return [
            seconds + self._exchange_s(assembly.program, stage, memory.static.grads)
            for stage, (seconds, memory) in enumerate(pairs)
        ]

    def _exchange_s(self, program: PipelineProgram, stage: int, grad_bytes: float) -> float:
        """Tied gradients, the exchange between replicas that nothing hides, and clipping.

        Without ZeRO the mean is an all-to-all and an all-gather. At level 1 the first half leaves
        beside the last backward but for its last parcel, and the parameters are gathered; from
        level 2 on gradients leave beside every backward (`Summary.timeline`).
        """
        spec, dp, zero = self.target.spec, self.options.dp, self.zero
        tied = [t.name for t in program.tied if stage in t.holders]
        tied_bytes: float = sum(self.footprint.size(name)[1] for name in tied)
        traffic = self.footprint.traffic(program, stage)
        if zero:
            tied_bytes /= dp if zero >= 2 else 1
            last = grad_bytes * (dp if zero >= 2 else 1)
            moving = min(last, PARCEL_BYTES) + traffic.unshard_total * dp / (dp + 1)
            sent = 2 * tied_bytes + moving * (dp - 1) / dp
        else:
            sent = 2 * tied_bytes + 2 * grad_bytes * (dp - 1) / dp
        moved = 3 * tied_bytes + (3 * grad_bytes if self.options.max_grad_norm else 0)
        return sent / spec.link_bytes_per_s + moved / spec.bytes_per_s

    def _optimizer_s(self, assembly: Assembly) -> list[float]:
        """Measured, or what the optimizer reads and writes at the peak rate of the memory."""
        factory, profiler = self.options.optimizer, self.target.profiler
        if factory is None:
            return [0.0] * self.options.n_stages
        if profiler is None:
            held = [memory.static for memory in assembly.memory]
            moved = [
                2 * s.weights + s.copies + s.grads / self._readers + 2 * s.states for s in held
            ]
            return [nbytes / self.target.spec.bytes_per_s for nbytes in moved]
        if self.measured_s is None:  # of all shapes alike
            params = [self.footprint.trainable(stage.params) for stage in assembly.program.stages]
            seconds = [self._measured_s(factory, each) for each in params]
            self.measured_s = self.team.pool(seconds)
        return self.measured_s

    @property
    def _readers(self) -> int:
        """Of how many ranks each reads its own share of a bucket of gradients."""
        return self.options.dp if self.zero == 1 else 1

    def _measured_s(
        self, factory: Callable[..., torch.optim.Optimizer], params: dict[str, torch.Tensor]
    ) -> float:
        """0 for an optimizer that cannot be made: its error comes where it is needed."""
        with contextlib.suppress(Exception):
            return optimizer_seconds(factory, params, self.target.device) if params else 0.0
        return 0.0


def _placement_note(decision: Decision) -> str:
    search = decision.search
    if not decision.unit_seconds:
        return "stages as in the first graph"
    proven = "proven best" if search.proven else f"within {search.gap:.1%} of the best possible"
    parts = [f"{len(decision.unit_nodes)} units, {proven} ({search.solver})"]
    return "; ".join(parts + ([search.note] if search.note else []))


def _placement_text(decision: Decision, locality: Locality) -> str:
    nodes = [n for n in locality.staged if phase_of(n) is Phase.FORWARD]
    lines, at = [], 0
    for i, (count, stage) in enumerate(zip(decision.unit_nodes, decision.unit_stage, strict=True)):
        mine = nodes[at : at + count]
        at += count
        modules = ", ".join(dict.fromkeys(module_of(n) or "(model)" for n in mine))
        label = decision.unit_recomputes[i]
        lines.append(f"stage {stage}  unit {i:3d}  {count:4d} nodes  recomputes {label}  {modules}")
    return "\n".join(lines) + "\n"

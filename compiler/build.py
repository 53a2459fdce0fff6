"""Drives the passes: a batch's shape in, stage programs, schedule and plan out."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from ..passes.attention import restore_attention
from ..passes.base import PassRecord, Recorder
from ..passes.baselines import solve_dynamic
from ..passes.communication import add_communication
from ..passes.partition import problem_of
from ..passes.placement import Placement, Site, follow, place
from ..passes.schedule.actions import Kind, Schedule, max_in_flight, to_text
from ..passes.schedule.one_f_one_b import forward_only, one_f_one_b, zb_h1
from ..passes.verify import (
    verify_graph,
    verify_in_flight,
    verify_placement,
    verify_program,
    verify_schedule,
)
from .batch import BatchSpec
from .capture import Captured, capture_evaluation, capture_forward, capture_training
from .cost import Cost, node_cost
from .errors import BatchError, CaptureError, LossError
from .graph import JointGraph, Phase, module_of, phase_of
from .hardware import Device, device_spec
from .locality import Locality, locality_of
from .lower import lower
from .options import CompileOptions, choose_microbatches
from .plan import Plan, StagePlan, TiedPlan, Transfer, covered_modules
from .program import PipelineProgram
from .simulate import Timeline, simulate
from .skeleton import Skeleton
from .units import Unit, units_of


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
    spec: BatchSpec, options: CompileOptions, replicas: int, ragged: bool = False
) -> tuple[BatchSpec, int]:
    """The spec of one microbatch, and the number of them per replica.

    Args:
        spec: of a batch that is cut over ``replicas`` first.
        ragged: take fewer microbatches where the rows do not divide, instead of refusing.

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

    Attributes:
        homes: parameter FQN -> the stages that hold it; empty before the first graph.
    """

    def __init__(self, skeleton: Skeleton, options: CompileOptions, device: torch.device):
        self.skeleton, self.options, self.device = skeleton, options, device
        self.spec: Device = device_spec(device)
        self.sites: dict[Site, int] = {}
        self.homes: dict[str, tuple[int, ...]] = {}

    def build(self, mode: Mode, spec: BatchSpec, microbatches: int, dump: bool = True) -> Compiled:
        """Compile one mode for one microbatch shape.

        The stages are chosen for training where the model can train on such a batch, also when
        something else is compiled first.

        Args:
            spec: of one microbatch.
            dump: write the files that ``dump_dir`` asks for (one rank does).
        """
        if not self.homes and mode is not Mode.TRAIN:
            with contextlib.suppress(LossError, CaptureError):
                self.build(Mode.TRAIN, spec, microbatches, dump=False)
        options = self.options
        recorder = Recorder(self._folder(mode, spec) if dump else None)
        with recorder.record("capture") as outcome:
            captured = self._capture(mode, spec)
            graph = captured.graph
            verify_graph(graph)
            counts = f"{len(list(graph.ops()))} operators, {len(graph.params)} parameters"
            outcome.note = "; ".join((counts, *captured.notes))
            outcome.texts[".py"] = graph.module.code
        with recorder.record("partition") as outcome:
            locality = locality_of(graph)
            units = units_of(graph, locality, self.spec)
            placement, outcome.note = self._place(graph, locality, units, microbatches)
            verify_placement(graph, placement.stage)
            outcome.texts[".txt"] = _placement_text(units, placement)
        with recorder.record("lower") as outcome:
            program = lower(
                graph,
                locality,
                placement.stage,
                options.n_stages,
                options.tied_grads,
                split_backward=options.schedule == "zb_h1" and mode is Mode.TRAIN,
            )
            verify_program(program)
            values = sum(len(message.values) for message in program.messages)
            outcome.note = f"{values} boundary values in {len(program.messages)} messages"
            outcome.texts |= _program_texts(program)
        self._settle(program, placement)
        with recorder.record("schedule") as outcome:
            name, compute = self._schedule(program, microbatches)
            schedule = add_communication(compute, program, options.dp)
            verify_schedule(schedule, program.messages, microbatches, program.trains)
            if program.trains:
                verify_in_flight(schedule, self._in_flight_limits(program, microbatches))
            outcome.note = f"{name}, {microbatches} microbatches"
            outcome.texts[".txt"] = to_text(schedule) + "\n"
        plan, timeline = self._plan(
            graph, units, placement, program, schedule, spec, microbatches, recorder.records
        )
        if recorder.folder is not None:
            (recorder.folder / "plan.json").write_text(plan.to_json())
        dims = captured.batch_dims
        return Compiled(program, schedule, plan, captured.rebuild, dims, timeline)

    def _schedule(self, program: PipelineProgram, microbatches: int) -> tuple[str, Schedule]:
        n_stages = self.options.n_stages
        if not program.trains:
            return "forward only", forward_only(n_stages, microbatches)
        if self.options.schedule == "zb_h1":
            splits = [stage.weight is not None for stage in program.stages]
            return "zb_h1", zb_h1(n_stages, microbatches, splits)
        return "1f1b", one_f_one_b(n_stages, microbatches)

    def _in_flight_limits(self, program: PipelineProgram, microbatches: int) -> list[int]:
        """S − s microbatches on stage s, and up to s more that wait for their weight gradients."""
        n_stages = self.options.n_stages
        return [
            min(n_stages if stage.weight else n_stages - stage.stage, microbatches)
            for stage in program.stages
        ]

    def _folder(self, mode: Mode, spec: BatchSpec) -> Path | None:
        if self.options.dump_dir is None:
            return None
        shape = "x".join(str(n) for n in spec.leaves[0].shape)
        return Path(self.options.dump_dir) / f"{mode}-{shape}"

    def _capture(self, mode: Mode, spec: BatchSpec) -> Captured:
        passes = (restore_attention,)
        if mode is Mode.FORWARD:
            return capture_forward(self.skeleton, spec, self.device, passes)
        capture = capture_training if mode is Mode.TRAIN else capture_evaluation
        return capture(self.skeleton, spec, self.options.loss_fn, self.device, passes)

    def _place(
        self, graph: JointGraph, locality: Locality, units: list[Unit], microbatches: int
    ) -> tuple[Placement, str]:
        if self.homes:
            placement = follow(graph, locality, self.sites, self.homes)
            return placement, "stages as in the first graph"
        problem = problem_of(units, self.spec, self.options.n_stages, microbatches)
        solution = solve_dynamic(problem)
        balance = max(solution.stages_s) * len(solution.stages_s) / sum(solution.stages_s)
        note = f"{len(units)} units, slowest stage {balance:.2f}× the mean"
        return place(graph, locality, units, solution), note

    def _settle(self, program: PipelineProgram, placement: Placement) -> None:
        """Remember the first graph's decisions; a parameter that nothing reads lives on stage 0."""
        if self.homes:
            return
        self.sites = placement.sites
        for name in self.skeleton.params:
            holders = tuple(p.stage for p in program.stages if name in p.params)
            self.homes[name] = holders or (0,)

    # -- the plan ---------------------------------------------------------------------------

    def _plan(
        self,
        graph: JointGraph,
        units: list[Unit],
        placement: Placement,
        program: PipelineProgram,
        schedule: Schedule,
        spec: BatchSpec,
        microbatches: int,
        records: list[PassRecord],
    ) -> tuple[Plan, Timeline]:
        costs = self._costs(placement, program)
        modules = self._modules(placement)
        sizes = self._sizes()
        stages = []
        for part in program.stages:
            s = part.stage
            forward, backward = costs[s, Kind.F], costs[s, Kind.B] + costs[s, Kind.W]
            stages.append(
                StagePlan(
                    stage=s,
                    modules=covered_modules(modules[s], modules, s),
                    units=len({u.index for u in units if placement.stage[u.nodes[0]] == s}),
                    params=part.params,
                    param_count=sum(sizes[name][0] for name in part.params),
                    param_bytes=sum(sizes[name][1] for name in part.params),
                    forward_flops=forward.flops,
                    backward_flops=backward.flops,
                    forward_s=forward.seconds,
                    backward_s=backward.seconds,
                    stash_bytes=part.stash_bytes,
                    carry_bytes=part.carry_bytes,
                    in_flight=max_in_flight(schedule[s]),
                    constant_bytes=part.constant_bytes,
                    sends=tuple(
                        Transfer(m.dst, m.phase.value, m.nbytes, tuple(v.name for v in m.values))
                        for m in program.messages
                        if m.src == s
                    ),
                )
            )
        timeline = self._simulate(program, schedule, costs)
        plan = Plan(
            model=type(self.skeleton.module).__name__,
            n_stages=self.options.n_stages,
            dp=self.options.dp,
            microbatches=microbatches,
            microbatch_rows=spec.rows,
            shape=str(spec),
            device=self.spec.name,
            fingerprint=graph.fingerprint(),
            param_count=sum(sizes[name][0] for name in self.skeleton.params),
            stages=tuple(stages),
            tied=tuple(self._tied(program)),
            schedule=tuple(to_text(schedule).splitlines()),
            step_s=timeline.makespan_s,
            bubble=timeline.bubble,
            notes=tuple((record.name, record.note) for record in records),
        )
        return plan, timeline

    def _costs(
        self, placement: Placement, program: PipelineProgram
    ) -> dict[tuple[int, Kind], Cost]:
        """Per stage, what F, B and W take for one microbatch."""
        costs: dict[tuple[int, Kind], Cost] = defaultdict(Cost)
        for node, stage in placement.stage.items():
            kind = Kind.F if phase_of(node) is Phase.FORWARD else Kind.B
            if node.name in program.weight_nodes:
                kind = Kind.W
            costs[stage, kind] += node_cost(node, self.spec)
        return costs

    def _modules(self, placement: Placement) -> list[list[str]]:
        modules: list[list[str]] = [[] for _ in range(self.options.n_stages)]
        for node, stage in placement.stage.items():
            if phase_of(node) is Phase.FORWARD:
                modules[stage].append(module_of(node))
        return modules

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Parameter FQN -> (elements, bytes)."""
        named = self.skeleton.module.named_parameters()
        return {name: (p.numel(), p.numel() * p.element_size()) for name, p in named}

    def _tied(self, program: PipelineProgram) -> list[TiedPlan]:
        sizes = self._sizes()
        return [
            TiedPlan(
                tied.name,
                tuple(n for n, first in self.skeleton.canonical.items() if first == tied.name),
                tied.holders,
                tied.owner,
                sizes[tied.name][1],
                self.options.tied_grads,
            )
            for tied in program.tied
        ]

    def _simulate(
        self,
        program: PipelineProgram,
        schedule: Schedule,
        costs: dict[tuple[int, Kind], Cost],
    ) -> Timeline:
        compute_s = {
            (stage, kind): costs[stage, kind].seconds
            for stage in range(self.options.n_stages)
            for kind in (Kind.F, Kind.B, Kind.W)
        }
        transfer_s = {
            (m.src, m.dst): m.nbytes / self.spec.link_bytes_per_s for m in program.messages
        }
        return simulate(schedule, compute_s, transfer_s)


def _placement_text(units: list[Unit], placement: Placement) -> str:
    lines = []
    for unit in units:
        stage = placement.stage[unit.nodes[0]]
        lines.append(
            f"stage {stage}  unit {unit.index:3d}  {len(unit.nodes):4d} nodes  "
            f"{unit.seconds * 1e3:9.3f} ms  "
            f"cut {unit.cut_bytes:12,d} bytes  {', '.join(m or '(model)' for m in unit.modules)}"
        )
    return "\n".join(lines) + "\n"


def _program_texts(program: PipelineProgram) -> dict[str, str]:
    texts = {}
    for stage in program.stages:
        parts = {"constants": stage.constants, "forward": stage.forward}
        parts |= {"backward": stage.backward} if stage.backward else {}
        parts |= {"weight": stage.weight} if stage.weight else {}
        for name, part in parts.items():
            texts[f"_stage{stage.stage}_{name}.py"] = part.text()
    return texts

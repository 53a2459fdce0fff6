"""A placed graph -> recomputation, stage programs, schedule, memory: all that needs no choice."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

from torch import fx

from ...passes.graph import boundary
from ...passes.graph.boundary import Crossings
from ...passes.graph.placement import Placement
from ...passes.graph.remat import Remat, rematerialise, undo
from ...passes.programs.inplace import reuse_memory
from ...passes.programs.lower import lower
from ...passes.programs.sharding import add_sharding, gather_parameters
from ...passes.programs.verify import (
    verify_graph,
    verify_in_flight,
    verify_placement,
    verify_program,
    verify_schedule,
    verify_sharding,
    verify_writes,
)
from ...passes.schedule.communication import add_communication
from ...passes.schedule.one_f_one_b import forward_only, one_f_one_b, zb_h1
from ..costs.footprint import Footprint
from ..costs.memory import StageMemory, stage_memory
from ..ir.actions import Schedule, to_text
from ..ir.graph import JointGraph
from ..ir.locality import Locality
from ..ir.program import PipelineProgram
from ..options.options import CompileOptions
from .record import Recorder


@dataclass(frozen=True)
class Assembly:
    """What follows from a placement.

    Attributes:
        memory: per stage.
        whole: the programs as they are without parameters that are gathered (zero=3).
    """

    graph: JointGraph
    remat: Remat
    crossings: Crossings
    program: PipelineProgram
    schedule: Schedule
    memory: tuple[StageMemory, ...]
    whole: PipelineProgram

    def take_apart(self) -> None:
        """Take what was inserted into the graph out again, so that it can be placed anew."""
        boundary.undo(self.crossings)
        undo(self.remat)


class Assembler:
    """Makes the programs of one model.

    Args:
        batch_bytes: per microbatch.
        device: the type that the programs run on.
    """

    def __init__(
        self,
        options: CompileOptions,
        footprint: Footprint,
        microbatches: int,
        batch_bytes: int,
        device: str,
    ):
        self.options, self.footprint, self.device = options, footprint, device
        self.microbatches, self.batch_bytes = microbatches, batch_bytes

    def assemble(
        self,
        graph: JointGraph,
        locality: Locality,
        placement: Placement,
        recomputed: Collection[fx.Node],
        recorder: Recorder,
    ) -> Assembly:
        options, zero = self.options, self.footprint.zero
        splits = options.schedule == "zb_h1" and graph.trains
        with recorder.record("remat") as outcome:
            verify_placement(graph, placement.stage)
            remat = rematerialise(graph, locality, placement.stage, recomputed)
            verify_graph(graph)
            verify_placement(graph, remat.stage)
            outcome.note = f"{len(remat.copies)} operators computed again"
            outcome.texts[".txt"] = partial(_remat_text, remat)
        with recorder.record("lower") as outcome:
            per_step = options.tied_grads == "per_step"
            crossings = boundary.narrow_crossings(
                graph, remat.locality, remat.stage, options.boundary, per_step
            )
            verify_graph(graph)
            verify_placement(graph, crossings.stage)
            program = lower(
                graph,
                crossings.locality,
                crossings.stage,
                options.n_stages,
                options.tied_grads,
                split_backward=splits,
                keep_views=zero < 3,
            )
            verify_program(program)
            values = sum(len(message.values) for message in program.messages)
            outcome.note = f"{values} boundary values in {len(program.messages)} messages"
            outcome.texts |= _program_texts(program)
        with recorder.record("inplace") as outcome:
            outcome.note = str(reuse_memory(program, self.device))
            verify_writes(program)
            outcome.texts |= _program_texts(program)
        whole = program
        if zero == 3:
            with recorder.record("gather") as outcome:
                program = gather_parameters(program, options.dp)
                verify_program(program)
                groups = sum(len(stage.groups) for stage in program.stages)
                outcome.note = f"{groups} groups of parameters are made whole when they are read"
                outcome.texts |= _program_texts(program)
        with recorder.record("schedule") as outcome:
            name, compute = self._schedule(program)
            schedule = add_communication(compute, program)
            schedule = add_sharding(schedule, program, options.dp, zero)
            verify_sharding(schedule, program, options.dp, zero)
            verify_schedule(schedule, program.messages, self.microbatches, program.trains)
            if program.trains:
                verify_in_flight(schedule, self.in_flight(splits))
            outcome.note = f"{name}, {self.microbatches} microbatches"
            outcome.texts[".txt"] = lambda: to_text(schedule) + "\n"
        with recorder.record("memory") as outcome:
            memory = self._memory(program, schedule)
            worst = max(memory, key=lambda m: m.peak_bytes)
            outcome.note = f"at most {worst.peak_bytes / 2**20:,.1f} MiB, in {worst.peak_at}"
        return Assembly(graph, remat, crossings, program, schedule, memory, whole)

    def in_flight(self, splits: bool) -> tuple[int, ...]:
        """S − s microbatches on stage s, and up to s more that wait for their weight gradients."""
        n_stages = self.options.n_stages
        return tuple(
            min(n_stages if splits else n_stages - stage, self.microbatches)
            for stage in range(n_stages)
        )

    def _schedule(self, program: PipelineProgram) -> tuple[str, Schedule]:
        n_stages = self.options.n_stages
        if not program.trains:
            return "forward only", forward_only(n_stages, self.microbatches)
        if self.options.schedule == "zb_h1":
            splits = [stage.weight is not None for stage in program.stages]
            return "zb_h1", zb_h1(n_stages, self.microbatches, splits)
        return "1f1b", one_f_one_b(n_stages, self.microbatches)

    def _memory(self, program: PipelineProgram, schedule: Schedule) -> tuple[StageMemory, ...]:
        options, share = self.options, self.batch_bytes * self.microbatches
        return tuple(
            stage_memory(
                program,
                stage.stage,
                schedule[stage.stage],
                self.footprint.static(stage, share),
                options.dp,
                self.footprint.optimizer_bytes(stage) if program.trains else 0,
                self.footprint.traffic(program, stage.stage),
            )
            for stage in program.stages
        )


def _remat_text(remat: Remat) -> str:
    lines = [f"stage {remat.stage[copy]}  {node.name}" for copy, node in remat.copies.items()]
    return "\n".join(lines) + "\n"


def _program_texts(program: PipelineProgram) -> dict[str, Callable[[], str]]:
    texts: dict[str, Callable[[], str]] = {}
    for stage in program.stages:
        parts = {"constants": stage.constants, "forward": stage.forward}
        parts |= {"backward": stage.backward} if stage.backward else {}
        parts |= {"weight": stage.weight} if stage.weight else {}
        for name, part in parts.items():
            texts[f"_stage{stage.stage}_{name}.py"] = part.text
    return texts

"""From a batch to the graph that takes it, and to what each rank gets of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..compiler.capture import batch as batches
from ..compiler.capture.batch import BatchSpec
from ..compiler.driver.builder import Builder
from ..compiler.driver.compiled import Compiled, Mode
from ..compiler.driver.layout import Layout
from ..compiler.ir.ops import mix
from ..compiler.options.microbatches import divide
from ..compiler.options.options import CompileOptions
from .executor import Job
from .world import World


@dataclass(frozen=True)
class Request:
    """A graph that a batch asks for; ``spec`` is of one microbatch."""

    mode: Mode
    spec: BatchSpec
    microbatches: int


class Loader:
    """Compiles for batch shapes, and deals microbatches out; every rank makes the same calls."""

    def __init__(self, world: World, builder: Builder, options: CompileOptions):
        self._world, self._builder, self._options = world, builder, options

    def request(
        self, mode: Mode, whole: BatchSpec, values: Sequence[torch.Tensor], obstacle: str = ""
    ) -> Request:
        """What a batch of this shape asks for.

        Args:
            values: its leaves; empty where there is its shape only.
            obstacle: what keeps this rank from running anything, if something does.

        Raises:
            CaptureError: a rank has an obstacle.
            BatchError: it does not fit the number of microbatches.
            RankMismatchError: another rank asks for something else, or a stage of the same replica
                has other data.
        """
        ragged = mode is not Mode.TRAIN
        spec, microbatches = divide(whole, self._options, self._world.replicas_here, ragged)
        self._world.agreement.check_batch(mode, spec, microbatches, values, obstacle)
        return Request(mode, spec, microbatches)

    def compile(
        self, request: Request, layout: Layout | None, values: Sequence[torch.Tensor]
    ) -> Compiled:
        """Compile what is asked for.

        Args:
            layout: of the graphs before; None for the first.
            values: the leaves of the batch, to measure with; empty where there is its shape only.
        """
        pieces = self._world.replicas_here * request.microbatches
        piece = batches.cut(values, pieces)[0] if values else ()
        return self._builder.build(
            request.mode, request.spec, request.microbatches, layout, self._world.is_main, piece
        )

    def deal(
        self, request: Request, values: list[torch.Tensor], seed: int, step: int
    ) -> dict[int, Job]:
        """Rank -> its replica's microbatches, on its device, and the seeds of their random ops.

        Args:
            values: the leaves of the batch.
            seed, step: what random ops are drawn from.
        """
        count = request.microbatches
        pieces = batches.cut(values, self._world.replicas_here * count)
        jobs = {}
        for rank, end in self._world.endpoints.items():
            local = 0 if self._world.mesh.distributed else end.replica
            mine = pieces[local * count : (local + 1) * count]
            moved = [[leaf.to(end.device, non_blocking=True) for leaf in piece] for piece in mine]
            jobs[rank] = Job(moved, [mix(seed, step, end.replica, i) for i in range(count)])
        return jobs

    def by_replica(self, jobs: Mapping[int, Job]) -> dict[int, list[list[torch.Tensor]]]:
        """Replica -> its microbatches, of those whose first rank this process plays."""
        mesh = self._world.mesh
        firsts = (rank for rank in jobs if mesh.position_of(rank) == 0)
        return {mesh.replica_of(rank): [list(x) for x in jobs[rank].batches] for rank in firsts}

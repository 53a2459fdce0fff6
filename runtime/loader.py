"""From a batch to the graph that takes it, and to what each rank gets of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..compiler.answers.guards import Choice, Difference, Guards, between
from ..compiler.capture import batch as batches
from ..compiler.capture.batch import BatchSpec
from ..compiler.driver.builder import Builder
from ..compiler.driver.compiled import Compiled, Mode
from ..compiler.driver.layout import Layout
from ..compiler.ir.errors import BatchError
from ..compiler.ir.ops import mix
from ..compiler.options.microbatches import divide
from ..compiler.options.options import CompileOptions
from ..compiler.tensors.fakes import is_fake
from .executor import Job
from .world import World

MOST_OUTCOMES = 8  # programs for microbatches of one shape


@dataclass(frozen=True)
class Request:
    """A graph that a batch asks for.

    Attributes:
        spec: of one microbatch.
        outcome: which of the graphs for such microbatches, where their values decide.
    """

    mode: Mode
    spec: BatchSpec
    microbatches: int
    outcome: int = 0


class Loader:
    """Compiles for batch shapes, and deals microbatches out; every rank makes the same calls."""

    def __init__(self, world: World, builder: Builder, options: CompileOptions):
        self._world, self._builder, self._options = world, builder, options
        self._guards: dict[Request, Guards] = {}

    def request(
        self, mode: Mode, whole: BatchSpec, values: Sequence[torch.Tensor], obstacle: str = ""
    ) -> Request:
        """What a batch of this shape asks for.

        Args:
            values: its leaves; empty where there is its shape only.
            obstacle: what keeps this rank from running anything, if something does.

        Raises:
            CaptureError: a rank has an obstacle.
            BatchError: it does not fit the number of microbatches, or these do not agree in what
                forward asks them.
            RankMismatchError: another rank asks for something else, or a stage of the same replica
                has other data.
        """
        ragged = mode is not Mode.TRAIN
        spec, microbatches = divide(whole, self._options, self._world.replicas_here, ragged)
        first = Request(mode, spec, microbatches)
        choice = self._chosen(first, values)
        self._world.agreement.check_batch(
            mode, spec, microbatches, values, choice, lambda: self._refusal(first, values), obstacle
        )
        if choice.outcome == MOST_OUTCOMES:
            raise BatchError(
                f"forward decides by the values of the batch {choice.others[-1][0]}, and this one "
                f"would need a program of its own, after {MOST_OUTCOMES} for other batches of this "
                "shape: keep it a tensor and choose with torch.where, or give batches that agree "
                "there (padded to a few lengths)"
            )
        return replace(first, outcome=choice.outcome)

    def _chosen(self, first: Request, values: Sequence[torch.Tensor]) -> Choice:
        """Of the graphs for such microbatches the one that is made for what these answer."""
        others: list[tuple[str, str, str]] = []
        request = first
        while values and request in self._guards:
            differences = self._differences(request, values)
            obstacle = self._obstacle(request, values, differences)
            if obstacle or differences[0] is None:
                return Choice(request.outcome, tuple(others), obstacle)
            others.append(differences[0].texts)
            request = replace(request, outcome=request.outcome + 1)
        return Choice(request.outcome, tuple(others))

    def _differences(
        self, request: Request, values: Sequence[torch.Tensor]
    ) -> list[Difference | None]:
        """Per microbatch, what it answers otherwise than a graph's."""
        guards = self._guards[request]
        if not guards:
            return [None]
        pieces = batches.cut(values, self._world.replicas_here * request.microbatches)
        return [guards.difference(piece) for piece in pieces]

    def _obstacle(
        self, request: Request, values: Sequence[torch.Tensor], found: list[Difference | None]
    ) -> str:
        """Why the microbatches cannot run one program; "" where they can."""
        text = between(found)
        odd = next((i for i, difference in enumerate(found) if difference is not None), 0)
        return text and (self._refusal(request, values, odd) or text)

    def _refusal(self, request: Request, values: Sequence[torch.Tensor], which: int = 0) -> str:
        """What forward raises on a microbatch; "" if it takes it."""
        pieces = batches.cut(values, self._world.replicas_here * request.microbatches)
        return self._builder.refusal(request.mode, request.spec, pieces[which])

    def compile(
        self, request: Request, layout: Layout | None, values: Sequence[torch.Tensor]
    ) -> Compiled:
        """Compile what is asked for.

        Args:
            layout: of the graphs before; None for the first.
            values: the leaves of the batch, which forward may ask, and to measure with; empty
                where there is its shape only.

        Raises:
            BatchError: its microbatches, or ranks, do not agree in what forward asks them.
        """
        values = () if any(map(is_fake, values)) else values
        pieces = self._world.replicas_here * request.microbatches
        piece = batches.cut(values, pieces)[0] if values else ()
        compiled = self._builder.build(
            request.mode, request.spec, request.microbatches, layout, self._world.is_main, piece
        )
        self._guards[request] = compiled.guards
        if values and compiled.guards:
            mine = self._obstacle(request, values, self._differences(request, values))
            for obstacle in filter(None, self._world.agreement.gather(mine)):
                raise BatchError(obstacle)
        return compiled

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

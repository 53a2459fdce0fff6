"""From a batch to the graph that takes it, and to what each rank gets of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..compiler.answers.guards import Choice, Difference, Guards, between
from ..compiler.answers.inputs import NumberError, Scalars
from ..compiler.capture import batch as batches
from ..compiler.capture.batch import BatchSpec
from ..compiler.driver.builder import Builder
from ..compiler.driver.compiled import Compiled, Mode
from ..compiler.driver.layout import Layout
from ..compiler.ir.errors import BatchError, PipecompileError
from ..compiler.ir.ops import mix
from ..compiler.options.microbatches import cut, microbatches_of
from ..compiler.options.options import CompileOptions
from ..compiler.options.ranges import stretched
from ..compiler.tensors.fakes import is_fake
from .data.cutter import Cutter, Parts, dealt
from .data.numbers import Numbers
from .executor import Job, PieceKind
from .world import World

Leaves = tuple[torch.Tensor, ...]
MOST_OUTCOMES = 8  # programs for microbatches of one shape


@dataclass(frozen=True)
class Request:
    """A graph that a batch asks for.

    Attributes:
        spec: of one microbatch.
        outcome: which of the graphs for such microbatches, where their values decide.
        weighs: tell how their losses make that of several.
    """

    mode: Mode
    spec: BatchSpec
    microbatches: int
    outcome: int = 0
    weighs: bool = False


@dataclass(frozen=True)
class Step:
    """How a batch is run.

    Attributes:
        requests: kind of a microbatch -> the graph for it, the one with the most rows first.
        sizes: per replica, the rows of each microbatch; 1 where a callable has cut them. One
            without rows runs a row that counts nothing, so that all replicas do the same.
        kinds: per replica, the kind of each microbatch.
        here: the replicas of which this process has the rows.
        spare: the leaves of a row for microbatches without rows.
        absent: ranks that were given no batch, as their stages read nothing of it.
        given: the leaves of the batch, or of one microbatch after the other where a callable has
            cut it; of an absent rank those that another has given it, where something is to be
            compiled, or else its numbers alone, or none.
        unlike: whether replicas were padded to lengths of their own.
    """

    requests: Mapping[PieceKind, Request]
    sizes: tuple[tuple[int, ...], ...]
    kinds: tuple[tuple[PieceKind, ...], ...]
    here: tuple[int, ...]
    spare: Leaves = ()
    absent: tuple[int, ...] = ()
    given: Leaves = ()
    unlike: bool = False

    @property
    def first(self) -> Request:
        return next(iter(self.requests.values()))

    @property
    def stands_in(self) -> bool:
        """Whether a microbatch has no rows."""
        return any(0 in sizes for sizes in self.sizes)


class Loader:
    """Compiles for batch shapes, and deals microbatches out; every rank makes the same calls."""

    def __init__(self, world: World, builder: Builder, options: CompileOptions):
        self._world, self._builder, self._options = world, builder, options
        self._guards: dict[Request, Guards] = {}
        self._scalars: dict[Request, Scalars] = {}
        self._numbers = Numbers(options.dynamic != "off" and options.cut is None)
        self._cutter = None if options.cut is None else Cutter(options, world.replicas_here)

    def step(
        self,
        mode: Mode,
        whole: BatchSpec | None,
        values: Sequence[torch.Tensor],
        obstacle: PipecompileError | None = None,
        several: bool = False,
        runs: bool = True,
    ) -> Step:
        """What a batch of this shape asks for.

        Args:
            whole: None on a rank that has no batch.
            values: its leaves; empty where there is its shape only.
            several: its loss is a part of that of several batches.
            obstacle: what keeps this rank from running anything, if something does.
            runs: or it is compiled for alone, where values do not matter.

        Raises:
            PipecompileError: a rank has an obstacle.
            NumberError: a number of the batch cannot be an input; `close` it, and ask again.
            BatchError: there are no rows, or microbatches do not agree in what forward asks them,
                or a rank without a batch needs it for that, or ``cut`` has failed.
            RankMismatchError: another rank asks for something else, or a stage of the same replica
                has other data.
        """
        agreement, mesh = self._world.agreement, self._world.mesh
        if whole is not None and runs and (inputs := self._numbers.inputs(mode)):
            whole, values = whole.opened(inputs, values)
        cuts = None
        if self._cutter is not None:
            cuts, values, failed = self._cutter.cut(whole, values)
            obstacle = obstacle or failed
        shown = values if runs else []
        agreed = agreement.check_batch(mode, whole, shown, obstacle, runs, cuts)
        specs = agreed.specs
        if fresh := self._numbers.met(mode, specs[0], runs):
            specs = [spec.opened(fresh, ())[0] for spec in specs]
            shown = shown if whole is None else whole.opened(fresh, shown)[1]
        parts = self._by_rows(specs) if self._cutter is None else self._cutter.parts(agreed)
        sizes, count = tuple(map(tuple, parts.sizes)), len(parts.sizes[0])
        shapes = parts.shapes
        kinds = tuple(
            tuple((max(1, n), shapes.index(like)) for n, like in zip(*each, strict=True))
            for each in zip(sizes, parts.likes, strict=True)
        )
        here = tuple(dict.fromkeys(map(mesh.replica_of, mesh.local_ranks)))
        weighs = several or (count * mesh.dp > 1 and shapes[0].varies)
        requests = {
            (n, shape): Request(mode, shapes[shape].with_rows(n), count, weighs=weighs)
            for n, shape in sorted({kind for each in kinds for kind in each}, key=_most_rows)
        }
        if agreed.absent:
            shown = self._brought(agreed.absent, requests.values(), shown)
        given = shown if runs or self._cutter is None else values
        spare = self._spare(sizes, given, here)
        if agreed.absent and shapes[0].plain_leaves:
            given = self._told(shapes[0], tuple(given))
        unlike = self._cutter is None and len(shapes) > 1
        step = Step(requests, sizes, kinds, here, spare, agreed.absent, tuple(given), unlike)
        if runs and any(self._guards.get(request) for request in requests.values()):
            step = self._answered(step, shown)
        return step

    def close(self, mode: Mode, error: NumberError) -> None:
        """Some numbers of batches are literals of their graphs again."""
        self._numbers.close(mode, error.why)

    def _by_rows(self, specs: Sequence[BatchSpec]) -> Parts:
        """Of the replicas' batches, or of that of all."""
        mesh = self._world.mesh
        if not mesh.distributed:
            specs = [specs[0].with_rows(n) for n in cut(specs[0].rows, mesh.dp)]
        rows = [spec.rows for spec in specs]
        count = microbatches_of(rows, self._options)
        first = next((spec for spec in specs if spec.rows), specs[0])
        likes = [[(spec if spec.rows else first).with_rows(1)] * count for spec in specs]
        return Parts([cut(each, count) for each in rows], likes)

    def _brought(
        self, absent: Sequence[int], requests: Iterable[Request], values: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """The leaves of this rank's share, which absent ranks are given if they are to compile."""
        known = [self._guards.get(request) for request in requests]
        if any(known):
            raise BatchError(
                "forward decides by the values of this batch, so that all ranks have to see it, "
                f"and rank {absent[0]} was given none: pipe.needs_data says which processes need "
                "one"
            )
        if None not in known:
            return values
        mesh, mine = self._world.mesh, self._world.mesh.rank
        assert mine is not None
        leaders = {mesh.rank_of(mesh.replica_of(rank), 0) for rank in absent}
        everyone = self._world.agreement.gather(list(values) if mine in leaders else None)
        if mine not in absent:
            return values
        given: list[torch.Tensor] = everyone[mesh.rank_of(mesh.replica_of(mine), 0)]
        return given

    def _told(self, spec: BatchSpec, mine: Leaves) -> Leaves:
        """The leaves of this rank's share; on a rank that has none the numbers, which are those of
        all ranks."""
        everyone = self._world.agreement.gather([mine[i] for i in spec.plain_leaves if mine])
        numbers = zip(spec.plain_leaves, next(filter(None, everyone)), strict=True)
        nothing: Any = dict.fromkeys(range(len(spec.leaves)))
        return mine or tuple((nothing | dict(numbers)).values())

    def _spare(
        self, sizes: Sequence[Sequence[int]], values: Sequence[torch.Tensor], here: Sequence[int]
    ) -> Leaves:
        """The first row here, or of another replica where this one has none."""
        mesh, rows = self._world.mesh, [sum(each) for each in sizes]
        if self._cutter is None:
            mine = tuple(v[:1] if v.dim() else v for v in values)
        else:
            mine = self._cutter.smallest(values, sum(rows[replica] for replica in here))
        if 0 not in rows or mesh.rank is None:
            return mine
        source = mesh.rank_of(next(r for r, n in enumerate(rows) if n), 0)
        given: Leaves = self._world.agreement.gather(mine if mesh.rank == source else None)[source]
        return mine if rows[mesh.replica_of(mesh.rank)] else given

    def pieces(self, step: Step, values: Sequence[torch.Tensor]) -> dict[int, list[Leaves]]:
        """Replica -> the leaves of its microbatches, of those that this process has the rows of;
        nothing in their places, but for numbers, where it was given no batch."""
        if (not values and not step.spare) or any(value is None for value in values):
            nothing: Any = tuple(values) or (None,) * len(step.first.spec.leaves)
            return {r: [nothing] * len(step.sizes[r]) for r in step.here}
        sizes = [n for replica in step.here for n in step.sizes[replica]]
        every = batches.cut(values, sizes) if self._cutter is None else dealt(values, sizes)
        found = iter(zip(every, sizes, strict=True))
        return {
            replica: [
                tuple(piece) if n else step.spare
                for piece, n in itertools.islice(found, len(step.sizes[replica]))
            ]
            for replica in step.here
        }

    def _of_kind(self, step: Step, values: Sequence[torch.Tensor], kind: PieceKind) -> list[Leaves]:
        """The microbatches of this process that are of a kind."""
        return [
            piece
            for replica, pieces in self.pieces(step, values).items()
            for piece, each in zip(pieces, step.kinds[replica], strict=True)
            if each == kind
        ]

    # -- what forward asks ------------------------------------------------------------------

    def _answered(self, step: Step, values: Sequence[torch.Tensor]) -> Step:
        """With the graphs that are made for what the microbatches answer."""
        requests = {}
        for kind, first in step.requests.items():
            pieces = self._of_kind(step, values, kind)
            choice = self._chosen(first, pieces)
            agreed = self._world.agreement.check_choice(
                choice, partial(self._refusal, first, pieces)
            )
            if agreed.outcome == MOST_OUTCOMES and (places := first.spec.plain_leaves):
                why = f"forward decides by it in more than {MOST_OUTCOMES} ways"
                raise NumberError({first.spec.leaves[i].name: why for i in places})
            if agreed.outcome == MOST_OUTCOMES:
                raise BatchError(
                    f"forward decides by the values of the batch {agreed.others[-1][0]}, and this "
                    f"one would need a program of its own, after {MOST_OUTCOMES} for other batches "
                    "of this shape: keep it a tensor and choose with torch.where, or give batches "
                    "that agree there (padded to a few lengths)"
                )
            requests[kind] = replace(first, outcome=agreed.outcome)
        return replace(step, requests=requests)

    def _chosen(self, first: Request, pieces: Sequence[Leaves]) -> Choice | None:
        """Of the graphs for such microbatches the one that is made for what these answer; None
        where there are none of these."""
        others: list[tuple[str, str, str]] = []
        request = first
        while pieces and request in self._guards:
            differences = self._differences(request, pieces)
            obstacle = self._obstacle(request, pieces, differences)
            if obstacle or differences[0] is None:
                return Choice(request.outcome, tuple(others), obstacle)
            others.append(differences[0].texts)
            request = replace(request, outcome=request.outcome + 1)
        return Choice(request.outcome, tuple(others)) if pieces else None

    def _differences(self, request: Request, pieces: Sequence[Leaves]) -> list[Difference | None]:
        """Per microbatch, what it answers otherwise than a graph's."""
        guards = self._guards[request]
        return [guards.difference(piece) for piece in pieces] if guards else [None]

    def _obstacle(
        self, request: Request, pieces: Sequence[Leaves], found: list[Difference | None]
    ) -> str:
        """Why the microbatches cannot run one program; "" where they can."""
        text = between(found)
        odd = next((i for i, difference in enumerate(found) if difference is not None), 0)
        return text and (self._refusal(request, pieces[odd:]) or text)

    def _refusal(self, request: Request, pieces: Sequence[Leaves]) -> str:
        """What forward raises on the first microbatch; "" if it takes it."""
        return self._builder.refusal(request.mode, request.spec, pieces[0]) if pieces else ""

    # -- compiling, and dealing out -----------------------------------------------------------

    def compile(
        self, step: Step, kind: PieceKind, layout: Layout | None, values: Sequence[torch.Tensor]
    ) -> Compiled:
        """Compile for the microbatches of a kind.

        Args:
            layout: of the graphs before; None for the first.
            values: the leaves of the batch, which forward may ask, and to measure with; empty
                where there is its shape only.

        Raises:
            BatchError: its microbatches, or ranks, do not agree in what forward asks them.
        """
        request = step.requests[kind]
        pieces: list[Leaves] = []
        if values and not any(map(is_fake, values)):
            pieces = self._of_kind(step, values, kind)
        like = pieces[:1] or ([stretched(step.spare, request.spec)] if values else [])
        compiled = self._builder.build(
            request.mode,
            request.spec,
            request.microbatches,
            layout,
            self._world.is_main,
            like[0] if like and not any(map(is_fake, like[0])) else (),
            request.weighs,
        )
        if step.absent and compiled.guards.of_batch and request.spec.plain_leaves:
            why = "forward decides by values of the batch, which some processes are not given"
            raise NumberError({request.spec.leaves[i].name: why for i in request.spec.plain_leaves})
        self._guards[request] = compiled.guards
        self._scalars[request] = compiled.scalars
        if compiled.guards:
            mine = self._obstacle(request, pieces, self._differences(request, pieces))
            for obstacle in filter(None, self._world.agreement.gather(mine)):
                raise BatchError(obstacle)
        return compiled

    def forget(self, requests: Iterable[Request]) -> None:
        """Their graphs are no longer there, and will be compiled anew."""
        for request in requests:
            del self._guards[request], self._scalars[request]

    def deal(self, step: Step, seed: int, number: int) -> dict[int, Job]:
        """Rank -> its replica's microbatches, on its device, and the seeds of their random ops.

        Args:
            seed, number: of the run and the step, what random ops are drawn from.
        """
        pieces, jobs = self.pieces(step, step.given), {}
        for rank, end in self._world.endpoints.items():
            sizes = step.sizes[end.replica]
            moved = [
                [leaf if leaf is None else leaf.to(end.device, non_blocking=True) for leaf in piece]
                for piece in pieces[end.replica]
            ]
            seeds = [mix(seed, number, end.replica, i) for i in range(len(sizes))]
            kinds = step.kinds[end.replica]
            pairs = zip(pieces[end.replica], kinds, strict=True)
            numbers = [self._scalars[step.requests[kind]].of(piece) for piece, kind in pairs]
            jobs[rank] = Job(moved, seeds, sizes, kinds, numbers, pieces[end.replica])
        return jobs

    def by_replica(self, jobs: Mapping[int, Job]) -> dict[int, list[list[torch.Tensor]]]:
        """Replica -> its microbatches that have rows, of those whose first rank this process
        plays."""
        mesh = self._world.mesh
        firsts = (rank for rank in jobs if mesh.position_of(rank) == 0)
        return {
            mesh.replica_of(rank): [
                list(piece)
                for piece, n in zip(jobs[rank].batches, jobs[rank].sizes, strict=True)
                if n
            ]
            for rank in firsts
        }


def _most_rows(kind: PieceKind) -> tuple[int, int]:
    rows, shape = kind
    return -rows, shape

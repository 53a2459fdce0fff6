"""From a batch to the graph that takes it, and to what each rank gets of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..compiler.answers.guards import Guards
from ..compiler.answers.inputs import NumberError, Scalars
from ..compiler.capture import batch as batches
from ..compiler.capture.batch import BatchSpec
from ..compiler.driver.builder import Builder
from ..compiler.driver.compiled import Compiled, Mode
from ..compiler.driver.layout import Layout
from ..compiler.host.frames import with_room
from ..compiler.ir.errors import BatchError, PipecompileError
from ..compiler.ir.ops import mix
from ..compiler.options.microbatches import cut, microbatches_of
from ..compiler.options.options import CompileOptions
from ..compiler.tensors.fakes import is_fake
from .data.cutter import Cutter, Parts, dealt
from .data.numbers import Numbers
from .exchange.agreement import Agreed
from .executor import Job, PieceKind
from .monitor.watching import reaches
from .world import World

Leaves = tuple[torch.Tensor, ...]
MOST_KNOWN = 1024  # batches whose division is kept
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
        self._known: dict[tuple[Mode, bool, tuple[BatchSpec, ...]], Step] = {}
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
            BatchError: there are no rows, or ``cut`` has failed.
            RankMismatchError: another rank asks for something else, or a stage of the same replica
                has other data.
        """
        if mode is Mode.TRAIN or not self._options.training:
            reaches(whole, values)
        agreement = self._world.agreement
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
        plain = self._cutter is None and not agreed.absent
        key = mode, several, tuple(specs)
        step = self._known.get(key) if plain else None
        if step is None:
            step = self._dealt(mode, specs, agreed, several)
            if plain:
                if len(self._known) > MOST_KNOWN:
                    self._known.clear()
                self._known[key] = step
        given = shown if runs or self._cutter is None else values
        spare = self._spare(step.sizes, given, step.here)
        if agreed.absent and step.first.spec.plain_leaves:
            given = self._told(step.first.spec, tuple(given))
        step = replace(step, spare=spare, given=tuple(given))
        return self.answered(step) if runs else step

    def _dealt(self, mode: Mode, specs: Sequence[BatchSpec], agreed: Agreed, several: bool) -> Step:
        """Which microbatches replicas make of their batches, and the graphs for these."""
        mesh = self._world.mesh
        parts = self._by_rows(specs) if self._cutter is None else self._cutter.parts(agreed)
        sizes, count = tuple(map(tuple, parts.sizes)), len(parts.sizes[0])
        shapes = parts.shapes
        kinds = tuple(
            tuple(PieceKind(max(1, n), shapes.index(like)) for n, like in zip(*each, strict=True))
            for each in zip(sizes, parts.likes, strict=True)
        )
        here = tuple(dict.fromkeys(map(mesh.replica_of, mesh.local_ranks)))
        weighs = several or (count * mesh.dp > 1 and shapes[0].varies)
        requests = {
            kind: Request(mode, shapes[kind.shape].with_rows(kind.rows), count, weighs=weighs)
            for kind in sorted({kind for each in kinds for kind in each}, key=_most_rows)
        }
        unlike = self._cutter is None and len(shapes) > 1
        return Step(requests, sizes, kinds, here, absent=agreed.absent, unlike=unlike)

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

    def _like(self, step: Step, kind: PieceKind, values: Sequence[torch.Tensor]) -> Leaves:
        """The first microbatch of a kind, the same on all ranks: what forward asks it decides."""
        mesh = self._world.mesh
        replica = next(r for r, kinds in enumerate(step.kinds) if kind in kinds)
        found: Leaves = ()
        if replica in step.here and mesh.rank not in step.absent and values:
            found = tuple(self.pieces(step, values)[replica][step.kinds[replica].index(kind)])
        if mesh.distributed and (mesh.dp > 1 or step.absent):
            leads = mesh.rank == mesh.rank_of(replica, 0)
            everyone = self._world.agreement.gather(found if leads else ())
            found = found or everyone[mesh.rank_of(replica, 0)]
        return () if any(map(is_fake, found)) else found

    # -- what forward asks ------------------------------------------------------------------

    def answered(self, step: Step) -> Step:
        """With the graphs that are made for what each microbatch answers.

        A microbatch that answers as none before it gets the number of the next graph; where several
        do, that one is made for the first of them, and the others have to be asked again.

        Raises:
            BatchError: one would need a graph more than are made.
            RankMismatchError: ranks of a replica answer otherwise.
        """
        if not any(map(self._asks, step.requests.values())):
            return step
        mine: dict[int, list[int]] = {}
        if self._world.mesh.rank not in step.absent:
            made = {kind: self._made_for(request) for kind, request in step.requests.items()}
            for replica, pieces in self.pieces(step, step.given).items():
                pairs = zip(pieces, step.kinds[replica], strict=True)
                mine[replica] = [_outcome(made[kind], each) for each, kind in pairs]
        outcomes = self._world.agreement.check_outcomes(mine)
        kinds = tuple(
            tuple(kind._replace(outcome=each) for kind, each in zip(*pair, strict=True))
            for pair in zip(step.kinds, outcomes, strict=True)
        )
        asked = {
            kind: replace(first, outcome=kind.outcome)
            for before, after in zip(step.kinds, kinds, strict=True)
            for kind, first in zip(after, map(step.requests.__getitem__, before), strict=True)
        }
        requests = {kind: asked[kind] for kind in sorted(asked, key=_most_rows)}
        for request in requests.values():
            self._check_number(request)
        return replace(step, requests=requests, kinds=kinds)

    def _asks(self, request: Request) -> bool:
        guards = self._guards.get(replace(request, outcome=0))
        return guards is not None and guards.of_batch

    def _made_for(self, request: Request) -> list[Guards]:
        """What the graphs that there are for such microbatches ask, by their outcomes."""
        found: list[Guards] = []
        while (guards := self._guards.get(replace(request, outcome=len(found)))) is not None:
            found.append(guards)
        return found

    def _check_number(self, request: Request) -> None:
        """Raises NumberError, or BatchError, if there would be too many graphs."""
        if request.outcome < MOST_OUTCOMES:
            return
        if places := request.spec.plain_leaves:
            why = f"forward decides by it in more than {MOST_OUTCOMES} ways"
            raise NumberError({request.spec.leaves[i].name: why for i in places})
        question = self._guards[replace(request, outcome=0)].questions[0]
        raise BatchError(
            f"forward decides by the values of the batch {question.where}, and this one would need "
            f"a program of its own, after {MOST_OUTCOMES} for other batches of this shape: keep it "
            "a tensor and choose with torch.where, or give batches that agree there (padded to a "
            "few lengths)"
        )

    # -- compiling, and dealing out -----------------------------------------------------------

    @with_room
    def compile(
        self, step: Step, kind: PieceKind, layout: Layout | None, values: Sequence[torch.Tensor]
    ) -> Compiled:
        """Compile for the microbatches of a kind.

        Args:
            layout: of the graphs before; None for the first.
            values: the leaves of the batch, which forward may ask, and to measure with; empty
                where there is its shape only.

        """
        request = step.requests[kind]
        compiled = self._builder.build(
            request.mode,
            request.spec,
            request.microbatches,
            layout,
            self._world.is_main,
            self._like(step, kind, values),
            request.weighs,
        )
        if step.absent and compiled.guards.of_batch and request.spec.plain_leaves:
            why = "forward decides by values of the batch, which some processes are not given"
            raise NumberError({request.spec.leaves[i].name: why for i in request.spec.plain_leaves})
        self._guards[request] = compiled.guards
        self._scalars[request] = compiled.scalars
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


def _outcome(made: Sequence[Guards], piece: Leaves) -> int:
    """The number of the graph that is made for what a microbatch answers; of the next, if there is
    none."""
    for outcome, guards in enumerate(made):
        if not guards or guards.difference(piece) is None:
            return outcome
    return len(made)


def _most_rows(kind: PieceKind) -> tuple[int, int, int]:
    return -kind.rows, kind.shape, kind.outcome

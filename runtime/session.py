"""What there is of a pipeline once something is compiled: tensors, optimizer, programs that run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch

from ..compiler.capture.skeleton import Skeleton
from ..compiler.driver.compiled import Compiled, Mode
from ..compiler.ir.errors import BatchError, OptionError, StateError
from ..compiler.ir.program import Role
from ..compiler.options.options import CompileOptions
from ..compiler.options.schedulers import make_scheduler
from ..compiler.rows.loss import Weights
from ..compiler.rows.sums import Sums
from ..compiler.rows.ways import How
from .batch_loss import BatchLoss, Told
from .executor import Executor, Job, drive
from .graphs.choice import recorder_for
from .loader import Request, Step
from .monitor.reports import report_of
from .outputs.parts import Part
from .ready import Loaded, Ready, check_together, kept_generators
from .state.accumulation import Accumulation
from .state.buffers import BufferUse, LatestBuffers
from .state.model_state import ModelState
from .state.reached import reached_by_data
from .stepping.loss_scaler import LossScaler
from .stepping.optimizer import make_optimizer
from .stepping.own_optimizers import OwnOptimizers
from .transport.doing import HERE
from .weights.materialize import Source
from .world import World

Stepping = tuple[torch.optim.Optimizer | None, Any]
"""An optimizer and its scheduler, where there are such."""

MOST_PROGRAMS = 64  # that are kept: another shape or mode is another one


class Session:
    """The tensors and the optimizer of this process's ranks, and the graphs that they run.

    Args:
        source: what parameters and buffers are filled from.
        first: the first graph; its layout is that of all others.

    Attributes:
        loaded: the graphs that are kept, those that were used last at the end.
        first: the first graph.
        buffers: where the latest values of buffers are.
        own: the optimizers that the user steps the parameters with.

    Raises:
        StateError: a tensor has no values; on every rank.
        RankMismatchError: ranks have other values of what several hold.
        OptionError: the optimizer's or scheduler's factory does not fit.
    """

    def __init__(
        self,
        world: World,
        skeleton: Skeleton,
        options: CompileOptions,
        source: Source,
        first: Compiled,
        scaler: LossScaler | None,
    ):
        self._world, self._scaler, self.layout = world, scaler, first.layout
        self._loss_weight, self._cudagraphs = options.loss_weight, options.cudagraphs
        self.state = world.agreement.together(
            lambda: ModelState(
                source,
                skeleton,
                first.layout,
                first.program,
                options.dtypes,
                world.endpoints,
                options.training,
                options.compression.gradients,
            ),
            StateError,
        )
        for each in self.state.compressed.values():
            each.recoverable |= scaler is not None
        world.agreement.check_copies(self.state.digests)
        self.buffers = LatestBuffers(world.mesh, self.state.ranks)
        self._sums = Accumulation(self.state)
        self.loaded: dict[Request, Loaded] = {}
        self.first = first
        self._compared: set[tuple[Request, ...]] = set()
        self.optimizer: torch.optim.Optimizer | None = None
        self.begin(self.stepping(options))

    def stepping(self, options: CompileOptions) -> Stepping:
        """The optimizer that options ask for, which has not stepped, and its scheduler.

        Raises:
            OptionError: it is none, or of another class than the one that there is.
        """
        if options.optimizer is None:
            return None, None
        made, before = make_optimizer(options.optimizer, self.state), self.optimizer
        if before is not None and type(made) is not type(before):
            raise OptionError(
                f"the pipeline was planned for {type(before).__name__}, and optimizer= makes "
                f"{type(made).__name__}, whose states are others: compile another pipeline for it"
            )
        scaler, agreement = self._scaler, self._world.agreement

        def stepped(*_: object) -> None:
            if scaler is not None:
                scaler.end_step()
            if not HERE.inside:
                agreement.note("pipe.optimizer.step()")

        made.register_step_post_hook(stepped)
        if options.lr_scheduler is None:
            return made, None
        return made, make_scheduler(options.lr_scheduler, made)

    def begin(self, stepping: Stepping) -> None:
        """Nothing has been trained yet, by what steps the parameters from now on."""
        self.optimizer, self.scheduler = stepping
        for each in self.state.compressed.values():
            each.restart()
        params = dict(self.state.named_parameters())
        self.own = OwnOptimizers(self.state.skeleton.originals, params, self.optimizer)

    def obstacle(self, mode: Mode) -> str:
        """What was done to the parameters that no program follows; "" if nothing was."""
        changed = self.state.switched if mode is Mode.TRAIN else []
        if not changed:
            return ""
        name, now = changed[0]
        was = "trained" if not now else "frozen"
        return (
            f"parameter {name!r} has requires_grad={now} and was compiled as {was}, which the "
            "compiled backward goes on with: call requires_grad_() on the model before compile(); "
            "in the middle of a training save, compile the model anew and load"
        )

    @property
    def updated(self) -> set[str]:
        """Buffers that a forward of any graph updates."""
        return {name for loaded in self.loaded.values() for name in loaded.buffers.updated}

    def add(self, request: Request, compiled: Compiled) -> None:
        """Make a graph ready to run."""
        program, position = compiled.program, self._world.mesh.position_of
        if self.state.compressed and (by_data := reached_by_data(program)):
            raise OptionError(
                f"compress= of gradients cannot go with parameters that a step may not reach, such "
                f"as {min(by_data)!r}: what was kept of them would be lost: leave it out"
            )
        count = request.microbatches
        before = [each.spec for each in self.loaded if each.mode is Mode.TRAIN]
        recorder = partial(
            recorder_for, compiled.graphed and self._cudagraphs, request.spec, before
        )
        self.state.provide(program)
        self._world.transport.open(program.routes)
        executors = {
            rank: Executor(
                program,
                compiled.schedule[position(rank)],
                state,
                count,
                compiled.fused,
                recorder(state.device),
            )
            for rank, state in self.state.ranks.items()
        }
        use, stale = BufferUse.of(program), set(self.buffers.stages)
        self.loaded[request] = Loaded(compiled, executors, use, stale)

    def drop_oldest(self, step: Step) -> list[Request]:
        """Let go of what was not used for longest, where there is too much; the same on all ranks.

        Args:
            step: about to run.
        """
        for request in step.requests.values():
            self.loaded[request] = self.loaded.pop(request)
        surplus = len(self.loaded) - max(MOST_PROGRAMS, len(step.requests))
        if surplus <= 0:
            return []
        dropped = list(self.loaded)[:surplus]
        for request in dropped:
            del self.loaded[request]
        self._compared = {each for each in self._compared if not set(each).intersection(dropped)}
        return dropped

    def ready(self, step: Step) -> Ready:
        """What runs a batch whose graphs are all there.

        Raises:
            BatchError: its microbatches cannot be run together.
        """
        graphs = {rows: self.loaded[request] for rows, request in step.requests.items()}
        if tuple(step.requests.values()) not in self._compared:
            check_together({rows: loaded.compiled for rows, loaded in graphs.items()})
            self._compared.add(tuple(step.requests.values()))
        updated = step.stands_in and {n for g in graphs.values() for n in g.buffers.updated}
        if updated:
            raise BatchError(
                f"there are fewer rows than microbatches, or cut= made fewer, and forward updates "
                f"buffer {min(updated)!r}, which one that has none may not: give batches of "
                "microbatches= × dp= rows, or what cut= divides into as many, or more"
            )
        weight = None if step.first.mode is Mode.FORWARD else self._loss_weight
        forms = {rows: loaded.compiled.loss for rows, loaded in graphs.items()}
        program = self.loaded[step.first].compiled.program
        for rank in step.absent:
            if any(self._reads(request, rank) for request in step.requests.values()):
                raise BatchError(
                    f"rank {rank} was given no batch, and its stages read of it, or count its "
                    "labels: pipe.needs_data says which processes need one"
                )
        specs = [request.spec for request in step.requests.values()]
        return Ready(graphs, BatchLoss(self._world, program, forms, weight, step), specs, step)

    def _reads(self, request: Request, rank: int) -> bool:
        """Whether a rank needs the batches of a graph: it answers for them, reads or counts."""
        compiled, mesh = self.loaded[request].compiled, self._world.mesh
        program, form = compiled.program, compiled.loss
        leaves, stages = len(request.spec.leaves), mesh.stages_of(rank)
        counts = self._loss_weight is not None or (form is not None and form.counting is not None)
        return (
            0 in stages
            or bool(compiled.guards)  # the graph for another answer may read it on any stage
            or (counts and program.loss_stage in stages)
            or any(
                port.role is Role.BATCH and int(port.key) < leaves
                for stage in stages
                for part in program.stages[stage].parts.values()
                for port in part.inputs
            )
        )

    @property
    def needs_data(self) -> bool:
        """Whether a rank of this process needs the batches of a graph."""
        return any(
            self._reads(request, rank) for request in self.loaded for rank in self.state.ranks
        )

    def run(self, ready: Ready, jobs: Mapping[int, Job]) -> None:
        """Run a batch on all ranks of this process. Call under `torch.no_grad()`."""
        graphs = ready.graphs.values()
        for loaded in graphs:
            for read in loaded.compiled.outside:
                read.check()
            for state in self.state.ranks.values():
                loaded.compiled.guards.check(state.buffers)
        self.state.spread()
        for loaded in graphs:
            self._catch_up(loaded)
        runs = [
            executor.run(jobs[rank], {n: each.executors[rank] for n, each in ready.graphs.items()})
            for rank, executor in ready.first.executors.items()
        ]
        with self._abandoned_if_it_fails(jobs), kept_generators(ready):
            drive(runs, self._world.transport.progress)
            self._world.transport.flush()
        for loaded in graphs:
            self.buffers.update(loaded.buffers)
            for other in self.loaded.values():
                if other is not loaded:
                    other.stale.update(loaded.buffers.updated)

    @contextlib.contextmanager
    def _abandoned_if_it_fails(self, jobs: Mapping[int, Job]) -> Iterator[None]:
        """A run that fails leaves no gradients and, in one process, nothing else behind; one that
        ranks refuse together has changed nothing."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception):
                for job in jobs.values():
                    job.agree()  # an error of all ranks comes before one of this
            if any(job.refused for job in jobs.values()):
                raise
            self._world.transport.abandon()
            for state in self.state.ranks.values():
                state.grads.abandon()
            for each in self.state.compressed.values():
                each.settle(taken=False)
            self._sums.drop()
            raise

    def _catch_up(self, loaded: Loaded) -> None:
        """With what other graphs have done to the buffers that this one reads."""
        transport, missing = self._world.transport, self.buffers.missing(loaded.buffers)
        transport.open((each.src, each.dst) for each in missing)  # which a run that failed forbids
        if missing:
            self.buffers.bring(missing)
            transport.flush()
        if not loaded.stale.isdisjoint(loaded.buffers.constant):
            loaded.refresh()
        loaded.stale.clear()

    def weigh(self, ready: Ready, jobs: Mapping[int, Job]) -> Weights:
        """What the microbatches of all replicas count; jobs are told."""
        return ready.loss.weigh(jobs, self._buffers())

    def _buffers(self) -> dict[int, dict[str, torch.Tensor]]:
        return {rank: state.buffers for rank, state in self.state.ranks.items()}

    def accumulate(self, ready: Ready, jobs: Mapping[int, Job], factor: float = 1.0) -> Told:
        """Train on a batch, and add its gradients to ``.grad``, as `forward_backward` says.

        Args:
            factor: what the loss is multiplied by before it is differentiated.
        """
        sent_bytes = self._world.transport.sent_bytes
        weighed = ready.loss.weighing(jobs, self._buffers())
        scaler = self._scaler
        scale = 1.0 if scaler is None else scaler.scale
        for executor in ready.executors():
            executor.scale = scale
        compressed = self.state.compressed.values()
        for each in compressed:
            each.scale = scale

        @cache
        def agreed() -> None:
            weighed()
            self._sums.open(scale)  # last: a batch that is refused leaves gradients as they are

        for job in jobs.values():
            job.scale, job.awaited = factor, agreed
        with self._left_alone(ready, jobs):
            self.run(ready, jobs)
        taken = scaler is None or self._unscaled(scaler)
        for each in compressed:
            each.settle(taken)
        if taken:
            self._sums.close(scale)
        else:
            self._sums.drop()
        spans_s = [(job.busy_s, job.ended_s - job.begun_s) for job in jobs.values()]
        sent_bytes = self._world.transport.sent_bytes - sent_bytes
        return ready.loss.total(jobs, weighed(), report_of(self._world.device, spans_s, sent_bytes))

    @contextlib.contextmanager
    def _left_alone(self, ready: Ready, jobs: Mapping[int, Job]) -> Iterator[None]:
        """A run inside; parameters that no gradient has reached, on any rank, are as without it."""
        by_data = set().union(*(executor.by_data for executor in ready.executors()))
        if not by_data:
            yield
            return
        for job in jobs.values():
            job.agree()
        states, blank = self.state.ranks.values(), self._sums.blank(by_data)
        for state in states:
            state.reached.restart()
        yield
        mine = set().union(*(state.reached.names for state in states))
        reached = set().union(*self._world.agreement.gather(mine))
        for name, slot in blank:
            if name not in reached:
                slot.fresh = True  # what it got is zeros

    def _unscaled(self, scaler: LossScaler) -> bool:
        """Whether all ranks have finite gradients; these are unscaled then."""
        scaler.saw(all(self._world.agreement.gather(self._sums.unscale(scaler.scale))))
        return not scaler.overflowed

    def refresh(self) -> None:
        """Make anew what was computed from parameters and buffers that have changed."""
        for loaded in self.loaded.values():
            loaded.refresh()

    # -- what a run gave --------------------------------------------------------------------

    def evaluated(self, ready: Ready, jobs: Mapping[int, Job]) -> torch.Tensor:
        """Run a batch that has a loss; the loss, on every rank."""
        weighed = ready.loss.weighing(jobs, self._buffers())
        for job in jobs.values():
            job.awaited = weighed
        self.run(ready, jobs)
        return ready.loss.total(jobs, weighed()).loss()

    def add_evaluated(self, ready: Ready, jobs: Mapping[int, Job], before: Sums | None) -> Sums:
        """Run one of the batches of a data set, and add its loss to that of those before.

        Raises:
            BatchError: they have no mean, or it would be run several times and updates buffers.
        """
        sums = ready.loss.sums(before)
        updated = {name for each in ready.graphs.values() for name in each.buffers.updated}
        if updated and len(sums.runs) > 1:
            raise BatchError(
                "terms of the loss count differently, so that a batch of a data set is run "
                f"{len(sums.runs)} times, and forward updates buffer {min(updated)!r} in "
                "evaluation: evaluate the batches one by one"
            )
        ready.loss.add(sums, jobs, self._buffers(), lambda: self.run(ready, jobs))
        return sums

    def returned(self, ready: Ready, jobs: Mapping[int, Job], here: Sequence[int]) -> Part:
        """Run a batch; what the model returns, on the ranks of the last stage.

        Args:
            here: the replicas whose results are to be joined.
        """
        weights = ready.loss.weigh_outputs(jobs, self._buffers(), here)
        self.run(ready, jobs)
        return self._part(ready, jobs, here, weights)

    def scored(
        self, ready: Ready, jobs: Mapping[int, Job], here: Sequence[int], before: Sums | None
    ) -> tuple[Part, Sums] | None:
        """As `returned`, where a loss is among what the model returns: it is added to that of the
        batches before, as `add_evaluated` does. None, and nothing is run, where it is not, or is a
        sum of terms that count differently.
        """
        outputs = ready.first.compiled.outputs
        place = next((i for i, each in enumerate(outputs) if each.how is How.LOSS), None)
        if place is None or ready.first.compiled.loss is None:
            return None
        if len((sums := ready.loss.sums(before)).runs) > 1:
            return None
        weights = ready.loss.weigh_outputs(jobs, self._buffers(), here)

        def run() -> None:
            self.run(ready, jobs)
            for job in jobs.values():
                job.losses = [result[place] for result in job.results]

        ready.loss.add(sums, jobs, self._buffers(), run)
        return self._part(ready, jobs, here, weights), sums

    def _part(
        self, ready: Ready, jobs: Mapping[int, Job], here: Sequence[int], weights: Weights
    ) -> Part:
        mesh, compiled = self._world.mesh, ready.first.compiled
        pieces = {
            mesh.replica_of(rank): job.results
            for rank, job in jobs.items()
            if mesh.n_stages - 1 in mesh.stages_of(rank)
        }
        sizes = {replica: ready.step.sizes[replica] for replica in here}
        return Part(compiled.outputs, compiled.rebuild, sizes, weights, pieces)

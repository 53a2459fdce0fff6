"""What there is of a pipeline once something is compiled: tensors, optimizer, programs that run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..compiler.capture.skeleton import Skeleton
from ..compiler.driver.compiled import Compiled, Mode
from ..compiler.ir.errors import BatchError, StateError
from ..compiler.ir.ops import generator_of
from ..compiler.options.options import CompileOptions
from ..compiler.options.schedulers import make_scheduler
from ..compiler.rows.loss import Weights, loss_of_outputs
from ..compiler.rows.outputs import joined
from ..compiler.rows.ways import How
from .batch_loss import BatchLoss
from .executor import Executor, Job, drive
from .loader import Request
from .loss_scaler import LossScaler
from .optimizer import clip_gradients, make_optimizer
from .own_optimizers import OwnOptimizers
from .state.accumulation import Accumulation
from .state.buffers import BufferUse, LatestBuffers
from .state.model_state import ModelState
from .weights.materialize import Source
from .world import World


@dataclass(frozen=True)
class Loaded:
    """A compiled graph, and per rank of this process what runs it.

    Attributes:
        loss: of the batch.
        buffers: what it does with buffers.
        stale: those that other graphs have updated since its constants were made.
    """

    compiled: Compiled
    executors: Mapping[int, Executor]
    loss: BatchLoss
    buffers: BufferUse
    stale: set[str]

    def refresh(self) -> None:
        """Make its constants anew."""
        self.stale.clear()
        for executor in self.executors.values():
            executor.refresh()


class Session:
    """The tensors and the optimizer of this process's ranks, and the graphs that they run.

    Args:
        source: what parameters and buffers are filled from.
        first: the first graph; its layout is that of all others.

    Attributes:
        loaded: the graphs, in the order in which they were asked for.
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
        self._loss_weight = options.loss_weight
        self.state = world.agreement.together(
            lambda: ModelState(
                source, skeleton, first.layout, first.program, options.dtypes, world.endpoints
            ),
            StateError,
        )
        world.agreement.check_copies(self.state.digests)
        self.buffers = LatestBuffers(world.mesh, self.state.ranks)
        self._sums = Accumulation(self.state)
        self.loaded: dict[Request, Loaded] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: Any = None
        self._at_work: Executor | None = None
        if options.optimizer is not None:
            self._make_optimizer(options)
        params = dict(self.state.named_parameters())
        self.own = OwnOptimizers(skeleton.originals, params, self.optimizer)

    def _make_optimizer(self, options: CompileOptions) -> None:
        assert options.optimizer is not None
        scaler = self._scaler
        self.optimizer = make_optimizer(options.optimizer, self.state)
        if scaler is not None:
            self.optimizer.register_step_post_hook(lambda *_: scaler.end_step())
        if options.lr_scheduler is not None:
            self.scheduler = make_scheduler(options.lr_scheduler, self.optimizer)

    @property
    def first(self) -> Compiled:
        return next(iter(self.loaded.values())).compiled

    @property
    def current(self) -> str:
        """The action that this process is in; "" between runs."""
        executor = self._at_work
        return str(executor.current) if executor is not None and executor.current else ""

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

    def add(self, request: Request, compiled: Compiled) -> None:
        """Make a graph ready to run."""
        self.state.provide(compiled.program)
        self._world.transport.open(compiled.program.routes)
        executors = {
            rank: Executor(
                compiled.program,
                compiled.schedule[self._world.mesh.position_of(rank)],
                state,
                request.microbatches,
            )
            for rank, state in self.state.ranks.items()
        }
        weight = None if request.mode is Mode.FORWARD else self._loss_weight
        loss = BatchLoss(self._world, compiled.program, compiled.loss, weight, request.spec)
        use, stale = BufferUse.of(compiled.program), set(self.buffers.stages)
        self.loaded[request] = Loaded(compiled, executors, loss, use, stale)

    def run(self, loaded: Loaded, jobs: Mapping[int, Job]) -> None:
        """Run a graph on all ranks of this process. Call under `torch.no_grad()`."""
        for read in loaded.compiled.outside:
            read.check()
        for state in self.state.ranks.values():
            loaded.compiled.guards.check(state.buffers)
        self._at_work = next(iter(loaded.executors.values()))
        self.state.spread()
        self._catch_up(loaded)
        runs = [executor.run(jobs[rank]) for rank, executor in loaded.executors.items()]
        with self._abandoned_if_it_fails(), _kept_generators(loaded):
            drive(runs, self._world.transport.progress)
            self._world.transport.flush()
        self.buffers.update(loaded.buffers)
        for other in self.loaded.values():
            if other is not loaded:
                other.stale.update(loaded.buffers.updated)
        self._at_work = None

    @contextlib.contextmanager
    def _abandoned_if_it_fails(self) -> Iterator[None]:
        """A run that fails leaves no gradients and, in one process, nothing else behind."""
        try:
            yield
        except BaseException:
            self._world.transport.abandon()
            for state in self.state.ranks.values():
                state.grads.abandon()
            self._sums.drop()
            self._at_work = None
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

    def weigh(self, loaded: Loaded, jobs: Mapping[int, Job]) -> Weights:
        """What the microbatches of all replicas count; jobs are told."""
        buffers = {rank: state.buffers for rank, state in self.state.ranks.items()}
        return loaded.loss.weigh(jobs, buffers)

    def accumulate(self, loaded: Loaded, jobs: Mapping[int, Job]) -> torch.Tensor:
        """Run a training graph, and add its gradients to ``.grad``, as `forward_backward` says; the
        loss."""
        weights = self.weigh(loaded, jobs)
        scaler = self._scaler
        scale = 1.0 if scaler is None else scaler.scale
        for executor in loaded.executors.values():
            executor.scale = scale
        self._sums.open(scale)
        with self._left_alone(loaded):
            self.run(loaded, jobs)
        if scaler is None or self._unscaled(scaler):
            self._sums.close(scale)
        else:
            self._sums.drop()
        return loaded.loss.total(jobs, weights)

    @contextlib.contextmanager
    def _left_alone(self, loaded: Loaded) -> Iterator[None]:
        """A run inside; parameters that no gradient has reached, on any rank, are as without it."""
        by_data = next(iter(loaded.executors.values())).by_data
        if not by_data:
            yield
            return
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

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients to a global norm of at most this; the norm that they had."""
        return clip_gradients(
            self.state, max_norm, self.state.skeleton.params, self._world.agreement.gather
        )

    def refresh(self) -> None:
        """Make anew what was computed from parameters and buffers that have changed."""
        for loaded in self.loaded.values():
            loaded.refresh()

    # -- what a run gave --------------------------------------------------------------------

    def evaluated(self, loaded: Loaded, jobs: Mapping[int, Job]) -> torch.Tensor:
        """Run a graph that has a loss; the loss of the batch, on every rank."""
        weights = self.weigh(loaded, jobs)
        self.run(loaded, jobs)
        return loaded.loss.total(jobs, weights)

    def output(self, loaded: Loaded, jobs: Mapping[int, Job]) -> Any:
        """Run a graph; what the model returns, on the ranks of the last stage; None on others.

        Raises:
            BatchError: an output of several microbatches cannot be joined.
        """
        mesh, buffers = self._world.mesh, {r: s.buffers for r, s in self.state.ranks.items()}
        weights = loaded.loss.weigh_outputs(jobs, buffers)
        self.run(loaded, jobs)
        last = [rank for rank in jobs if mesh.n_stages - 1 in mesh.stages_of(rank)]
        if not last:
            return None
        pieces = [piece for rank in last for piece in jobs[rank].results]
        whole = []
        for i, output in enumerate(loaded.compiled.outputs):
            if output.why and len(pieces) > 1:
                raise BatchError(
                    f"forward() got {output.name!r} from each of {len(pieces)} microbatches and "
                    f"cannot join them, as it {output.why}: compile with microbatches=1"
                )
            found = [piece[i].to(pieces[0][i].device) for piece in pieces]
            if output.how is How.LOSS:
                whole.append(loss_of_outputs(torch.stack(found), weights))
            else:
                whole.append(joined(found, output))
        return loaded.compiled.rebuild(whole)


@contextlib.contextmanager
def _kept_generators(loaded: Loaded) -> Iterator[None]:
    """The user's own random streams go on as if nothing had been drawn."""
    devices = {e.state.device for e in loaded.executors.values() if e.draws}
    kept = [(generator_of(d), generator_of(d).get_state()) for d in devices]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)

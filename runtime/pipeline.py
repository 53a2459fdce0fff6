"""The object that users hold: a compiled model that trains."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..compiler.capture import batch as batches
from ..compiler.capture.batch import BatchSpec
from ..compiler.capture.skeleton import Skeleton
from ..compiler.driver.builder import Builder
from ..compiler.driver.compiled import Compiled, Mode
from ..compiler.driver.layout import Layout
from ..compiler.ir.errors import BatchError, NotCompiledError, OptionError, StateError
from ..compiler.ir.ops import generator_of, mix
from ..compiler.ir.program import PipelineProgram, Role
from ..compiler.options.microbatches import divide
from ..compiler.options.options import CompileOptions
from ..compiler.plan.plan import Plan
from ..compiler.planning.target import Target
from ..compiler.profiling.profile import Profiler
from ..compiler.profiling.timing_cache import default_cache_dir
from .checkpoint.checkpoint import Checkpoints
from .checkpoint.snapshot import Training, config_of
from .exchange.agreement import Agreement
from .exchange.devices import device_of, endpoints, ranks_here, target_of
from .exchange.link import measure_link
from .exchange.mesh import Mesh, connect
from .exchange.processes import Processes
from .exchange.ranks import Ranks
from .exchange.transport import Loopback, Transport
from .exchange.watchdog import Watchdog
from .executor import Executor, Job, drive
from .loss_scaler import LossScaler
from .optimizer import clip_gradients, make_optimizer
from .state import state_dict as state_dicts
from .state.accumulation import Accumulation
from .state.model_state import ModelState
from .weights.materialize import Source, source_of

_numbers = itertools.count()
"""Numbers the pipelines of this process; all ranks make them in the same order."""


@dataclass(frozen=True)
class _Loaded:
    compiled: Compiled
    executors: dict[int, Executor]


class Pipeline:
    """A model compiled for n_stages × dp ranks; made by `pipecompile.compile`.

    Args:
        why: how the number of stages was chosen, where it was.

    Attributes:
        data_shards: into how many shares the caller cuts the data: dp between processes, 1 where
            one process plays all ranks (and cuts each batch over the replicas itself).
        data_shard: which of these this process loads; the same on all stages of a replica.
        loss_scaler: with precision="fp16"; None otherwise.
        checkpoint_extras: name -> an object with ``state_dict`` and ``load_state_dict``, alike on
            all ranks, that `save` and `load` include; where a checkpoint has none by that name,
            the object is left as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        options: CompileOptions,
        skeleton: Skeleton,
        mesh: Mesh,
        device: torch.device,
        why: str = "",
    ):
        self._options, self._skeleton, self._mesh, self._device = options, skeleton, mesh, device
        self._loaded: dict[tuple[Mode, BatchSpec, int], _Loaded] = {}
        self._state: ModelState | None = None
        self._layout: Layout | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._scheduler: Any = None
        self._steps = 0
        precision = options.dtypes
        scaling = precision.loss_scale if precision is not None else None
        self.loss_scaler = None if scaling is None else LossScaler(scaling)
        self._at_work: Executor | None = None
        self._watchdog: Watchdog | None = None
        self.data_shards = mesh.dp if mesh.distributed else 1
        self.data_shard = mesh.replica_of(mesh.rank) if mesh.rank is not None else 0
        first = mesh.local_ranks[0]
        connect(mesh, device_of(first, device, mesh))
        if mesh.rank is None:
            self._transport: Transport = Loopback()
        else:
            self._watchdog = Watchdog(mesh.rank, str(next(_numbers)), self._status)
            self._transport = Processes(mesh, device_of(first, device, mesh))
        self._agreement = Agreement(mesh, device)
        self._checkpoints = Checkpoints(mesh, self._agreement)
        self._config = config_of(model)
        self.checkpoint_extras: dict[str, Any] = {}
        team = Ranks(mesh, self._agreement, model, options)
        self._builder = Builder(skeleton, options, self._target(), team, why)
        seed = torch.initial_seed() if options.seed is None else options.seed
        self._seed = self._agreement.gather(seed)[0]
        self._source: Source | None = self._agreement.together(
            lambda: source_of(model, skeleton, options.weights, self._seed, self.is_main),
            StateError,
        )
        if options.example_batch is not None:
            self.compile_for(options.example_batch)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and saves: rank 0, or the only one."""
        return self._mesh.rank in (None, 0)

    def compile_for(self, batch: Any) -> Plan:
        """Compile the training step for batches of this shape now, without running it.

        Args:
            batch: what `step` will be given, or its `BatchSpec`: values do not matter.
        """
        with self._guard():
            whole = batch if isinstance(batch, BatchSpec) else batches.flatten(batch)[1]
            return self._load(Mode.TRAIN, whole).compiled.plan

    # -- training ---------------------------------------------------------------------------

    def step(self, batch: Any) -> torch.Tensor:
        """Train on one batch: forward, backward, clip, optimizer, scheduler, zero_grad.

        Args:
            batch: dict, tuple or tensor, cut into microbatches along dim 0. Under torchrun this
                replica's share of the global batch, in one process all of it.

        Returns:
            The mean loss over the microbatches of all replicas, a 0-dim tensor on every rank.
            Where a scaled fp16 gradient of any stage or replica overflowed, parameters, optimizer
            and scheduler stay as they were, and the next step has a smaller scale.

        Raises:
            OptionError: compiled without ``optimizer=``.
            BatchError: the batch does not fit the model or the number of microbatches.
        """
        if self._options.optimizer is None:
            raise OptionError(
                "step() needs an optimizer: give compile() one, for example optimizer="
                "functools.partial(torch.optim.AdamW, lr=3e-4), or use forward_backward()"
            )
        loss = self.forward_backward(batch)
        if self.loss_scaler is not None and self.loss_scaler.overflowed:
            self.zero_grad()
            return loss
        if self._options.max_grad_norm is not None:
            self.clip_grad_norm_(self._options.max_grad_norm)
        self.optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        self.zero_grad()
        return loss

    def forward_backward(self, batch: Any) -> torch.Tensor:
        """Add the gradients of a batch to ``.grad`` of the parameters; returns the mean loss.

        The gradient is the mean over microbatches and replicas. With loss scaling it is unscaled
        again; where it is not finite, on any rank, all ranks drop theirs (``.grad`` is None) and
        those of further calls, until the optimizer's step, which changes nothing, or `zero_grad`.
        """
        with self._guard():
            loaded, jobs = self._prepare(Mode.TRAIN, batch)
            scaler = self.loss_scaler
            scale = 1.0 if scaler is None else scaler.scale
            for executor in loaded.executors.values():
                executor.scale_loss(scale)
            self._sums.open(scale)
            self._run(loaded, jobs)
            if scaler is None or self._unscaled(scaler):
                self._sums.close(scale)
            else:
                self._sums.drop()
            self._steps += 1
            return self._mean_loss(loaded, jobs)

    def _unscaled(self, scaler: LossScaler) -> bool:
        """Whether all ranks have finite gradients; these are unscaled then."""
        scaler.saw(all(self._agreement.gather(self._sums.unscale(scaler.scale))))
        return not scaler.overflowed

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their global 2-norm is at most ``max_norm``.

        The norm is over all stages, each tied parameter counted once; it is returned, as it was
        before scaling, on every rank. The arithmetic is `torch.nn.utils.clip_grad_norm_`'s.
        """
        state = self._require_state()
        with self._guard():
            return clip_gradients(state, max_norm, self._skeleton.params, self._agreement.gather)

    def zero_grad(self) -> None:
        """Drop all gradients (set ``.grad`` to None)."""
        for _, param in self.named_parameters():
            param.grad = None
        if self.loss_scaler is not None:
            self.loss_scaler.end_step()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the parameters that this process holds."""
        if self._optimizer is None:
            self._require_state()
            raise OptionError("compile() was given no optimizer")
        return self._optimizer

    # -- evaluation -------------------------------------------------------------------------

    def evaluate(self, batch: Any) -> torch.Tensor:
        """The mean loss of a batch in evaluation mode, on every rank; nothing is stashed."""
        with self._guard():
            loaded, jobs = self._prepare(Mode.EVALUATE, batch)
            self._run(loaded, jobs)
            return self._mean_loss(loaded, jobs)

    def forward(self, batch: Any) -> Any:
        """What the model returns for a batch, in evaluation mode.

        Returns:
            On the ranks of the last stage the model's own output structure, with tensors of the
            microbatches joined along dim 0 and scalars averaged; None on other ranks.

        Raises:
            BatchError: an output has no dimension that grows with the batch, so that those of
                several microbatches cannot be joined.
        """
        with self._guard():
            loaded, jobs = self._prepare(Mode.FORWARD, batch)
            self._run(loaded, jobs)
            last = [r for r in jobs if self._mesh.n_stages - 1 in self._mesh.stages_of(r)]
            if not last:
                return None
            pieces = [piece for rank in last for piece in jobs[rank].results]
            dims = enumerate(loaded.compiled.batch_dims)
            joined = [_join([piece[i] for piece in pieces], dim) for i, dim in dims]
            return loaded.compiled.rebuild(joined)

    # -- state ------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that this process holds, each once."""
        return (param for _, param in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that this process holds, under their names in the model, in its order."""
        return self._require_state().named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """All parameters and buffers, full, on the CPU, under the names that the model gives them.

        Between processes every rank must call it, and every rank gets all of it. It loads into
        the unmodified model with ``strict=True``.
        """
        state = self._require_state()
        with self._guard():
            return state_dicts.gather(state, self._buffer_stages())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict`, or the unmodified model's own, returned.

        Raises:
            StateError: names or shapes differ; nothing has been changed then.
        """
        state_dicts.load(self._require_state(), state_dict)
        self._refresh()

    # -- checkpoints ------------------------------------------------------------------------

    def save(
        self,
        directory: str | Path,
        *,
        data: Any = None,
        keep: int | None = None,
        async_save: bool = False,
    ) -> Path:
        """Write a checkpoint, which `load` opens under any number of stages and replicas.

        It has parameters, persistent buffers, optimizer and LR scheduler, the number of steps,
        and the random states; not gradients that wait for a step. Every rank must call it.

        Args:
            directory: of the run; this checkpoint becomes ``step-00000012`` in it, and ``latest``
                names it. All machines must share it.
            data: an object whose ``state_dict()`` is the position in the data; it is asked for on
                the first stage of each replica.
            keep: remove older checkpoints but this many, this one included; None keeps all.
            async_save: copy to host memory now and write while training goes on. An error is
                raised by the next save, load or `wait_for_save`. Python does not exit before it
                is written.

        Returns:
            The checkpoint's own folder.

        Raises:
            NotCompiledError: there is nothing to save before the first batch.
            CheckpointError: it cannot be written; those before it are as they were.
        """
        training = self._training(data)
        with self._guard():
            return self._checkpoints.save(training, Path(directory), keep, async_save)

    def load(self, directory: str | Path, *, data: Any = None) -> int:
        """Go on from a checkpoint, whatever stages and replicas it was saved under.

        One of weights alone is loaded as step 0, and the optimizer starts afresh.

        Args:
            directory: as `save` was given it, for its ``latest`` (or its newest, if that is
                missing); or the folder of one checkpoint.
            data: an object whose ``load_state_dict`` takes the position in the data.

        Returns:
            After how many calls of `step` or `forward_backward` it was saved.

        Raises:
            NotCompiledError: before the first batch, when there is nothing to load into.
            CheckpointError: there is none, it is damaged or of something else; on every rank,
                and nothing has been changed.
        """
        training = self._training(data)
        with self._guard():
            self._seed, self._steps = self._checkpoints.load(training, Path(directory))
            self.zero_grad()
            self._refresh()
        return self._steps

    def wait_for_save(self) -> None:
        """Wait until a save with ``async_save=True`` is on the disk; on every rank.

        Raises:
            CheckpointError: it failed.
        """
        with self._guard():
            self._checkpoints.wait()

    # -- what was decided -------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The decisions of the first compiled graph."""
        return self._first().compiled.plan

    @property
    def programs(self) -> PipelineProgram:
        """The stage programs of the first compiled graph."""
        return self._first().compiled.program

    @property
    def compiled(self) -> Compiled:
        """Programs, schedule, plan and simulated timeline of the first compiled graph."""
        return self._first().compiled

    # -- the inside -------------------------------------------------------------------------

    def _target(self) -> Target:
        """What to compile for; measures the link where there is one and prices are measured."""
        options, mesh = self._options, self._mesh
        target = target_of(options, self._device, mesh)
        if not options.measures:
            return target
        here = device_of(mesh.local_ranks[0], self._device, mesh)
        beside = ranks_here(mesh) if mesh.distributed else 1
        spec = target.spec
        if mesh.distributed and mesh.size > 1:
            spec = spec.with_link(
                *measure_link(mesh, here, self._transport, self._agreement.gather)
            )
        profiler = Profiler(here, default_cache_dir(), beside=beside)
        return replace(target, spec=spec, profiler=profiler)

    def _first(self) -> _Loaded:
        if not self._loaded:
            raise NotCompiledError(
                "nothing is compiled before the first batch: give compile() an example_batch=, "
                "call compile_for(batch), or run a step first"
            )
        return next(iter(self._loaded.values()))

    def _require_state(self) -> ModelState:
        self._first()
        assert self._state is not None
        return self._state

    def _status(self) -> str:
        executor = self._at_work
        return str(executor.current) if executor is not None and executor.current else ""

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        if torch.is_autocast_enabled(self._device.type):
            raise OptionError(
                "torch.autocast is active around the pipeline, where it has no part: leave it out, "
                'and give compile() precision="bf16" or "fp16"'
            )
        guard = self._watchdog.guard() if self._watchdog else contextlib.nullcontext()
        with guard, torch.no_grad():
            yield

    def _prepare(self, mode: Mode, batch: Any) -> tuple[_Loaded, dict[int, Job]]:
        """Compile for the batch's shape if need be, and deal the microbatches out."""
        values, whole = batches.flatten(batch)
        loaded = self._load(mode, whole, values)
        self._agreement.check_data(values)
        microbatches = loaded.compiled.plan.microbatches
        replicas = self._mesh.dp // self.data_shards
        pieces = batches.cut(values, replicas * microbatches)
        jobs = {}
        for rank, executor in loaded.executors.items():
            local = self._mesh.replica_of(rank) if not self._mesh.distributed else 0
            mine = pieces[local * microbatches : (local + 1) * microbatches]
            device = executor.state.device
            moved = [[leaf.to(device, non_blocking=True) for leaf in piece] for piece in mine]
            replica = self._mesh.replica_of(rank)
            seeds = [mix(self._seed, self._steps, replica, i) for i in range(microbatches)]
            jobs[rank] = Job(moved, seeds)
        return loaded, jobs

    def _run(self, loaded: _Loaded, jobs: dict[int, Job]) -> None:
        self._at_work = next(iter(loaded.executors.values()))
        self._require_state().spread()
        runs = [executor.run(jobs[rank]) for rank, executor in loaded.executors.items()]
        with _kept_generators(loaded):
            drive(runs, self._transport.progress)
            self._transport.flush()
        self._at_work = None

    def _mean_loss(self, loaded: _Loaded, jobs: dict[int, Job]) -> torch.Tensor:
        program = loaded.compiled.program
        mine = {
            self._mesh.replica_of(rank): torch.stack(job.losses).mean()
            for rank, job in jobs.items()
            if program.loss_stage in self._mesh.stages_of(rank)
        }
        device = next(iter(loaded.executors.values())).state.device
        if not self._mesh.distributed:
            return torch.stack([mine[r].to(device) for r in sorted(mine)]).mean()
        losses = torch.zeros(self._mesh.size, dtype=torch.float64, device=device)
        for replica, loss in mine.items():
            losses[self._mesh.rank_of(replica, program.loss_stage)] = loss
        dist.all_reduce(losses)  # adds zeros: exact
        ranks = self._mesh.replicas_of(program.loss_stage)
        assert program.loss_dtype is not None
        return losses[list(ranks)].to(program.loss_dtype).mean()

    # -- compiling --------------------------------------------------------------------------

    def _load(self, mode: Mode, whole: BatchSpec, values: Sequence[torch.Tensor] = ()) -> _Loaded:
        replicas = self._mesh.dp // self.data_shards
        ragged = mode is not Mode.TRAIN
        spec, microbatches = divide(whole, self._options, replicas, ragged)
        key = (mode, spec, microbatches)
        self._agreement.check_program(*key)
        if key not in self._loaded:
            piece = batches.cut(values, replicas * microbatches)[0] if values else ()
            self._loaded[key] = self._compile(mode, spec, microbatches, piece)
        return self._loaded[key]

    def _compile(
        self, mode: Mode, spec: BatchSpec, microbatches: int, piece: Sequence[torch.Tensor]
    ) -> _Loaded:
        compiled = self._builder.build(mode, spec, microbatches, self._layout, self.is_main, piece)
        if self._state is None:
            made = self._agreement.together(lambda: self._make_state(compiled), StateError)
            self._agreement.check_copies(made.digests)
            self._state, self._source, self._layout = made, None, compiled.layout
            self._sums = Accumulation(made)
            self._make_optimizer()
        state = self._state
        assert state is not None
        state.provide(compiled.program)
        self._transport.open(compiled.program.routes)
        executors = {
            rank: Executor(
                compiled.program,
                compiled.schedule[self._mesh.position_of(rank)],
                rank_state,
                microbatches,
            )
            for rank, rank_state in state.ranks.items()
        }
        return _Loaded(compiled, executors)

    def _make_state(self, compiled: Compiled) -> ModelState:
        assert self._source is not None
        return ModelState(
            self._source,
            self._skeleton,
            compiled.layout,
            compiled.program,
            self._options.dtypes,
            endpoints(self._mesh, self._device, self._transport),
        )

    def _make_optimizer(self) -> None:
        state = self._state
        assert state is not None
        if self._options.optimizer is None:
            return
        self._optimizer = make_optimizer(self._options.optimizer, state)
        scaler = self.loss_scaler
        if scaler is not None:
            self._optimizer.register_step_post_hook(lambda *_: scaler.end_step())
        if self._options.lr_scheduler is not None:
            self._scheduler = self._options.lr_scheduler(self._optimizer)

    def _training(self, data: Any) -> Training:
        return Training(
            state=self._require_state(),
            optimizer=self._optimizer,
            scheduler=self._scheduler,
            data=data,
            extras=self._extras,
            buffer_stages=self._buffer_stages(),
            seed=self._seed,
            steps=self._steps,
            config=self._config,
        )

    @property
    def _extras(self) -> dict[str, Any]:
        scaler = {} if self.loss_scaler is None else {"loss_scaler": self.loss_scaler}
        return self.checkpoint_extras | scaler

    def _refresh(self) -> None:
        """Make anew what was computed from parameters and buffers that have changed."""
        for loaded in self._loaded.values():
            for executor in loaded.executors.values():
                executor.refresh()

    def _buffer_stages(self) -> dict[str, int]:
        return {
            str(port.key): stage.stage
            for loaded in self._loaded.values()
            for stage in loaded.compiled.program.stages
            for port in stage.forward.outputs
            if port.role is Role.BUFFER
        }


def _join(pieces: list[torch.Tensor], dim: int | None) -> torch.Tensor:
    """One output from those of the microbatches."""
    first = pieces[0]
    here = [piece.to(first.device) for piece in pieces]
    if len(pieces) == 1:
        return first
    if dim is not None:
        return torch.cat(here, dim)
    if first.dim() == 0 and first.is_floating_point():
        return torch.stack(here).mean()
    raise BatchError(
        f"forward() got an output of shape {list(first.shape)} without a batch dimension from "
        f"each of {len(pieces)} microbatches and cannot join them: compile with microbatches=1"
    )


@contextlib.contextmanager
def _kept_generators(loaded: _Loaded) -> Iterator[None]:
    """The user's own random streams go on as if nothing had been drawn."""
    devices = {e.state.device for e in loaded.executors.values() if e.draws}
    kept = [(generator_of(d), generator_of(d).get_state()) for d in devices]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)

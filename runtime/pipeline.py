"""The object that users hold: a compiled model that trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..compiler.answers.inputs import NumberError
from ..compiler.capture import batch as batches
from ..compiler.capture.batch import BatchSpec
from ..compiler.capture.skeleton import Skeleton
from ..compiler.capture.whole import LOSS
from ..compiler.driver.builder import Builder
from ..compiler.driver.compiled import Compiled, Mode, main_mode
from ..compiler.driver.record import prepare
from ..compiler.host.frames import with_room
from ..compiler.ir.errors import BatchError, CaptureError, NotCompiledError, OptionError, StateError
from ..compiler.ir.program import PipelineProgram
from ..compiler.kept.cache import Cache, default_cache_dir
from ..compiler.options.options import CompileOptions
from ..compiler.options.schedulers import steps_alone
from ..compiler.plan.plan import Plan
from .checkpoint.checkpoint import Checkpoints
from .checkpoint.snapshot import config_of
from .data.dataset_loader import DataSetLoader, DataSetLoaders
from .evaluated import Evaluated
from .exchange.ranks import Ranks
from .executor import Job
from .interchange.adapters import adapters_of
from .loader import Loader, Step
from .monitor.callbacks import Callbacks
from .monitor.machine import machine_of
from .monitor.meter import Meter, planned_of
from .ready import Ready
from .recording.recording import Recording
from .session import Session
from .stepped import Stepped, factor_of
from .stepping.loss_scaler import LossScaler
from .stepping.pace import pace_of
from .transport.doing import HERE
from .transport.mesh import Mesh
from .verify.verifier import Verifier
from .weights.materialize import Source, source_of
from .world import World


class Pipeline(Stepped, Evaluated):
    """A model compiled for n_stages × dp ranks; made by `pipecompile.compile`.

    Args:
        notes: name -> what was chosen before anything was compiled, and why; "" for nothing.

    Attributes:
        data_shards: into how many shares the caller cuts the data: dp between processes, 1 where
            one process plays all ranks (and cuts each batch over the replicas itself).
        data_shard: which of these this process loads; the same on all stages of a replica.
        loss_scaler: with precision="fp16"; None otherwise.
        checkpoint_extras: name -> an object with ``state_dict`` and ``load_state_dict`` that `save`
            and `load` include, such as an optimizer of yours; where a checkpoint has none by that
            name, the object is left as it is.
        callbacks: what rank 0 tells of steps, evaluations and saves; a list that may be changed.
    """

    def __init__(
        self,
        model: nn.Module,
        options: CompileOptions,
        skeleton: Skeleton,
        mesh: Mesh,
        device: torch.device,
        notes: Mapping[str, str] = MappingProxyType({}),
    ):
        self._options, self._skeleton = options, skeleton
        self._session: Session | None = None
        self._steps = 0
        precision = options.dtypes
        scaling = precision.loss_scale if precision is not None and options.training else None
        self.loss_scaler = None if scaling is None else LossScaler(scaling)
        world = self._world = World(mesh, device, options)
        self.data_shards, self.data_shard = world.data_shards, world.data_shard
        self.callbacks = Callbacks(options.callbacks, self.is_main)
        with world.compiling():
            dump_dir = options.dump_dir if self.is_main else None
            world.agreement.together(lambda: prepare(dump_dir), OptionError)
            self._checkpoints = Checkpoints(mesh, world.agreement)
            self._config, self._adapters = config_of(model), adapters_of(model)
            self.checkpoint_extras: dict[str, Any] = {}
            self._loaders = DataSetLoaders()
            team = Ranks(mesh, world.agreement, model, options)
            cache = Cache(default_cache_dir())
            target = world.target(options)
            builder = Builder(skeleton, options, target, team, notes, cache)
            module = skeleton.module
            self._meter = Meter(machine_of(mesh, world.device, target.spec, options, module))
            devices = {rank: endpoint.device for rank, endpoint in world.endpoints.items()}
            self._recording = Recording(mesh, world.agreement, devices)
            self._loader = Loader(world, builder, options)
            seed = torch.initial_seed() if options.seed is None else options.seed
            self._seed = world.agreement.gather(seed)[0]
            self._verifier = None
            if options.verify:
                here = world.device if self.is_main else None
                self._verifier = Verifier(model, options, world.agreement, mesh, here)
            self._source: Source | None = world.agreement.together(
                lambda: source_of(model, skeleton, options.weights, self._seed, self.is_main),
                StateError,
            )
            if options.example_batch is not None:
                self.compile_for(options.example_batch)
            world.agreement.together(lambda: self.callbacks.start(self), OptionError)

    @property
    def needs_data(self) -> bool:
        """Whether this process has to be given batches. Where its stages read nothing of those that
        were met so far it may be given None, and needs no loader; before the first it needs one."""
        return self._session is None or self._session.needs_data

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and saves: rank 0, or the only one."""
        return self._world.is_main

    def compile_for(self, batch: Any) -> Plan:
        """Compile the training step for batches of this shape now, without running it; with
        training=False the forward.

        Args:
            batch: what `step` will be given, or its `BatchSpec`. Values matter only where forward
                decides by them (``if mask.any():``).
        """
        with self._world.guard("compile_for()"):
            values, whole = ([], batch) if isinstance(batch, BatchSpec) else self._flat(batch)
            mode = main_mode(self._options)
            session, step = self._load(mode, whole, values, runs=False)
            return session.loaded[step.first].compiled.plan

    # -- training ---------------------------------------------------------------------------

    def step(self, batch: Any) -> torch.Tensor:
        """Train on one batch: forward, backward, clip, optimizer, scheduler, zero_grad.

        Args:
            batch: dict, tuple or tensor, cut along dim 0, or by ``cut``: under torchrun this
                replica's share of the global one, in one process all of it. None where `needs_data`
                says that this process needs none.

        Returns:
            The loss of the whole global batch, as ``loss_normalization`` says, a 0-dim tensor on
            every rank.
            Where a scaled fp16 gradient of any stage or replica overflowed, parameters, optimizer
            and scheduler stay as they were, and the next step has a smaller scale.

        Raises:
            OptionError: compiled without ``optimizer=``, or with ``training=False``.
            BatchError: the batch does not fit the model.
            StateError: another thread is in a call of the pipeline.
        """
        self._check_training("step()")
        if self._options.optimizer is None:
            raise OptionError(
                "step() needs an optimizer: give compile() one, for example optimizer="
                "functools.partial(torch.optim.AdamW, lr=3e-4), or use forward_backward()"
            )
        with self._world.alone("step()"), self._recording.range(f"step {self._steps}"):
            loss = self._step(batch)
        self.end_step()
        return loss

    @with_room
    def _step(self, batch: Any) -> torch.Tensor:
        verifier = self._verifying(batch)
        with self._world.guard("step()"):
            loss = self._accumulate(batch)
            if verifier is not None or self.loss_scaler is not None:
                loss()
        if verifier is not None:
            verifier.computed(loss(), dict(self.named_parameters()))
        norm = None
        if self.loss_scaler is not None and self.loss_scaler.overflowed:
            self.zero_grad()
            return loss()
        if self._options.max_grad_norm is not None:
            norm = self.clip_grad_norm_(self._options.max_grad_norm)
        with self._world.changing("step()", "its optimizer"):
            self.optimizer.step()
            scheduler = self._require().scheduler
            if scheduler is not None and steps_alone(scheduler):
                scheduler.step()
            self.zero_grad()
            found = loss()  # last, so that nobody waits for ranks that have more to do
        if verifier is not None:
            self._verify(verifier, batch, norm)
        return found

    def loader(self, dataset: Any, batch_size: int | None = None, **options: Any) -> DataSetLoader:
        """A loader of a data set, with the rows of this process in each batch.

        Its position is saved and loaded with the pipeline (make the same loaders in the same order
        to resume): ``for epoch in range(loader.epoch, epochs): for batch in loader: ...``.

        Args:
            dataset: with a length, and items by number; or what `pipecompile.data.batches` made of
                one before there was a pipeline, alone.
            batch_size: rows of a global batch; the last one of a pass may have fewer.
            options: ``shuffle=True`` for another order in each pass, ``drop_last=True``,
                ``whole_batches=True`` to load all rows of a batch in every process and cut it
                afterwards (``collate_fn`` then pads to the longest of all), and those of torch's
                `DataLoader`, such as ``collate_fn`` and ``num_workers``.

        Raises:
            OptionError: the data set has no length, or an option is not known.
        """
        if isinstance(dataset, DataSetLoader):
            if batch_size is not None or options:
                raise OptionError(
                    "pipe.loader() was given a loader of pipecompile.data.batches(), which has its "
                    "batch_size= and options: give them there"
                )
            made = dataset
        else:
            made = DataSetLoader(dataset, batch_size, **options)
        pinned = self._world.device.type == "cuda"
        made.bind(self.data_shards, self.data_shard, self._seed, self._options.cut, pinned)
        self._loaders.add(made)
        return made

    def forward_backward(self, batch: Any, *, scale: float = 1.0) -> torch.Tensor:
        """Add the gradients of a batch to ``.grad`` of the parameters; returns the loss.

        Both are those of the whole global batch, as ``loss_normalization`` says. With loss scaling
        gradients are unscaled again; where one is not finite, on any rank, all ranks drop theirs
        (``.grad`` is None) and those of further calls, until the optimizer's step, which changes
        nothing, or `zero_grad`.

        Args:
            scale: what the loss is multiplied by before it is differentiated, as in
                ``(loss * scale).backward()``: 1 / k for the mean of k calls. The loss that is
                returned is not. The same on every rank.

        Raises:
            OptionError: ``scale`` is no finite number; or compiled with ``training=False``.
        """
        self._check_training("forward_backward()")
        factor = factor_of(scale)
        call = "forward_backward()" if factor == 1.0 else f"forward_backward(scale={factor})"
        with self._world.guard(call), self._recording.range(f"step {self._steps}"):
            return self._accumulate(batch, factor)()

    def _accumulate(self, batch: Any, factor: float = 1.0) -> Callable[[], torch.Tensor]:
        """As `forward_backward`; what is returned waits for the loss."""
        meter = self._meter
        meter.begin()
        session, ready, jobs = self._prepare(Mode.TRAIN, batch)
        told = session.accumulate(ready, jobs, factor)
        self._steps += 1
        meter.planned = meter.planned or planned_of(session.first.plan)
        meter.ran(ready.amounts, told.loss, told.reports, session.optimizer)
        if (scaler := self.loss_scaler) is not None:
            meter.scaled(scaler.scale, scaler.overflowed)
        return told.loss

    @property
    def verification(self) -> str:
        """What the first steps were compared with one process in, of ``verify=``; on rank 0."""
        return "" if self._verifier is None else self._verifier.report.summary()

    # -- what was decided -------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The decisions of the first compiled graph."""
        return self._require().first.plan

    @property
    def programs(self) -> PipelineProgram:
        """The stage programs of the first compiled graph."""
        return self._require().first.program

    @property
    def compiled(self) -> Compiled:
        """Programs, schedule, plan and simulated timeline of the first compiled graph."""
        return self._require().first

    def trace(
        self, path: str | Path, *, plan: str | Path | None = None
    ) -> AbstractContextManager[None]:
        """Record what happens in the steps inside ``with pipe.trace("run.json"):``.

        Rank 0 writes one file of all ranks, which Perfetto (ui.perfetto.dev) and chrome://tracing
        open and `pipecompile diff` compares with a plan's. Every rank must enter it. Where a step
        fails, each process writes what it has done itself: ``run.rank1.json``, or the only one
        ``run.json``.

        Args:
            plan: write what was predicted too, for `pipecompile diff`.

        Raises:
            TraceError: a file cannot be written, or nothing has run inside.
            RankMismatchError: another rank does something else.
        """
        paths = Path(path), None if plan is None else Path(plan)
        return self._recording.trace(*paths, lambda: self._require().first, self._world.guard)

    # -- the inside -------------------------------------------------------------------------

    def _require(self) -> Session:
        if self._session is None:
            raise NotCompiledError(
                "nothing is compiled before the first batch: give compile() an example_batch=, "
                "call compile_for(batch), or run a step first"
            )
        return self._session

    def _load(
        self,
        mode: Mode,
        whole: BatchSpec | None,
        values: list[torch.Tensor],
        runs: bool = True,
        several: bool = False,
    ) -> tuple[Session, Step]:
        """Compile for a batch if need be, which ``runs`` then; the first begins the session."""
        why = self._session.obstacle(mode) if self._session else ""
        obstacle = CaptureError(why) if why else None
        while True:
            try:
                step = self._loader.step(mode, whole, values, obstacle, several, runs)
                with HERE.phase("its compilation"):
                    while self._compile(step, values) and runs:
                        step = self._loader.answered(step)
                break
            except NumberError as error:  # on every rank; numbers are fewer each time
                self._loader.close(mode, error)
        session = self._require()
        self._loader.forget(session.drop_oldest(step))
        return session, step

    def _compile(self, step: Step, values: list[torch.Tensor]) -> bool:
        """What a step needs and is not there yet; whether any of that asks the batch."""
        asks = False
        for kind, request in step.requests.items():
            if (session := self._session) is not None and request in session.loaded:
                continue
            layout = None if session is None else session.layout
            made = self._loader.compile(step, kind, layout, step.given or values)
            if session is None:
                assert self._source is not None
                self._session = session = Session(
                    self._world, self._skeleton, self._options, self._source, made, self.loss_scaler
                )
                self._source = None
            session.add(request, made)
            asks |= bool(made.guards)
        return asks

    def _flat(self, batch: Any) -> tuple[list[torch.Tensor], BatchSpec]:
        return batches.flatten(batch, by_rows=self._options.cut is None)

    def _prepare(
        self, mode: Mode, batch: Any, several: bool = False
    ) -> tuple[Session, Ready, dict[int, Job]]:
        """What runs on a batch, or one of several, and what each rank gets of it."""
        values, whole = ([], None) if batch is None else self._flat(batch)
        if mode is Mode.TRAIN and (known := self._session) is not None:
            self._check_weights("a step")
            pace = pace_of(known.optimizer, known.scheduler, known.state)
            self._world.agreement.pace = pace
        session, step = self._load(mode, whole, values, several=several)
        self._recording.attach(session.state.ranks, session.optimizer)
        ready = session.ready(step)
        return session, ready, self._loader.deal(step, self._seed, self._steps)

    def _verifying(self, batch: Any) -> Verifier | None:
        """What compares this step with one process, if anything does."""
        verifier = self._verifier
        if verifier is None or not verifier.active:
            return None
        with self._world.guard("step()"):
            session, ready, jobs = self._prepare(Mode.TRAIN, batch)
            weights = session.weigh(ready, jobs)
        mine, spec = self._loader.by_replica(jobs), ready.specs[0]
        if len({each.constants for each in ready.specs}) > 1:
            raise BatchError(
                "verify= compares microbatches with the same numbers in them, and those of pieces "
                "of cut= differ: give them as 0-dim tensors"
            )
        eager, updated = self._skeleton.regions.drawing, self._skeleton.updated
        told = eager, updated, bool(self.plan.decision.chunk_rows)
        verifier.begin(mine, spec, self._seed, self._steps, weights, *told)
        return verifier

    def _verify(self, verifier: Verifier, batch: Any, norm: torch.Tensor | None) -> None:
        """What a step has left; after the last that is compared, evaluation too."""
        loss = {f"{LOSS}.{name}": value for name, value in self.loss_state_dict().items()}
        verifier.stepped(norm, self.state_dict() | loss)
        if verifier.active:
            return
        verifier.evaluated(self._evaluated(batch))
        output, why_not = None, ""
        try:
            output = self.forward(batch)
        except (BatchError, CaptureError) as error:
            why_not = str(error)
        verifier.returned(output, why_not)

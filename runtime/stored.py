"""What of a pipeline outlives it: state dicts, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..compiler.ir.errors import CheckpointError, OptionError, PipecompileError, StateError
from ..compiler.options.options import CompileOptions
from .checkpoint.checkpoint import Checkpoints
from .checkpoint.restore import Restore
from .checkpoint.snapshot import Training
from .data.dataset_loader import DataSetLoaders
from .exchange.alike import check_values
from .monitor.callbacks import Callbacks
from .session import Session
from .state import state_dict as state_dicts
from .state.into_model import Filled
from .state.state_dict import IncompatibleKeys, Piece
from .stepping.loss_scaler import LossScaler
from .world import World

M = TypeVar("M", bound=nn.Module | None)


class Stored:
    """The part of `Pipeline` that reads and writes its state."""

    callbacks: Callbacks
    checkpoint_extras: dict[str, Any]
    loss_scaler: LossScaler | None
    _options: CompileOptions
    _world: World
    _checkpoints: Checkpoints
    _loaders: DataSetLoaders
    _config: dict[str, Any] | None
    _adapters: dict[str, Any] | None
    _seed: int
    _steps: int

    def zero_grad(self) -> None:
        """Drop all gradients."""
        raise NotImplementedError

    def _require(self) -> Session:
        raise NotImplementedError

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that this process holds, each once."""
        return (param for _, param in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that this process holds, under their names in the model, in its order;
        where replicas divide them, its rows, or those that it owns."""
        return self._require().state.named_parameters()

    def state_dict(self, *, rank0_only: bool = False) -> dict[str, Any]:
        """All parameters and buffers, full, on the CPU, under the names that the model gives them.

        Between processes every rank must call it, and every rank gets all of it. It loads into
        the unmodified model with ``strict=True``.

        Args:
            rank0_only: rank 0 gets all of it, the others an empty dict, and hold nothing besides.
        """
        session = self._require()
        with self._world.guard(f"state_dict({'rank0_only=True' if rank0_only else ''})"):
            self._check_whole()
            readers = (0,) if rank0_only else None
            return state_dicts.gather(session.state, session.buffers.stages, readers=readers)

    def iter_state_dict(self, *, rank0_only: bool = False) -> Iterator[tuple[str, Any]]:
        """What `state_dict` has, as pairs of which one tensor at a time is in memory.

        Every rank must go through all of it. Names that are one tensor follow each other.

        Args:
            rank0_only: rank 0 gets the pairs; on others the loop is as long and has no pass.

        Raises:
            StateError: the pipeline was trained in between.
        """
        session = self._require()
        state, stages = session.state, session.buffers.stages
        return self._iterated(state_dicts.pieces_of(state, stages), (0,) if rank0_only else None)

    def _iterated(
        self, pieces: Sequence[Piece], readers: Sequence[int] | None
    ) -> Iterator[tuple[str, Any]]:
        state, steps = self._require().state, self._steps
        for piece in pieces:
            with self._world.guard("iter_state_dict()"):
                self._check_whole()
                if self._steps != steps:
                    raise StateError(
                        f"iter_state_dict() began after step {steps}, and the pipeline has trained "
                        f"until {self._steps} since: take the whole of it between two steps"
                    )
                value = state_dicts.fetch(state, piece, readers)
            if state_dicts.reads(state, readers):
                for name in piece.names:
                    yield name, value
            del value

    def load_into(self, model: M) -> M:
        """Copy the trained parameters and buffers into a plain model, one tensor at a time.

        The model is another one of the kind that was compiled, or that very one: its own dtypes
        and devices stay, so that a model in bf16 gets the values rounded to it. Between processes
        every rank must call it; one that needs no model passes None, and holds nothing.

        Returns:
            The model.

        Raises:
            StateError: names, shapes, kinds of dtypes or ties differ, on any rank; nothing has been
                changed then, on none.
        """
        session, agreement = self._require(), self._world.agreement
        with self._world.guard("load_into()"):
            self._check_whole()
            state = session.state
            target = agreement.together(
                lambda: None if model is None else Filled(state, model), StateError
            )
            readers = [r for r, has in enumerate(agreement.gather(target is not None)) if has]
            if not readers:
                raise StateError("load_into() was given None on every rank: give one a model")
            for piece in state_dicts.pieces_of(state, session.buffers.stages):
                told = readers if len(readers) < self._world.mesh.size else None
                value = state_dicts.fetch(state, piece, told)
                if target is not None:
                    target.take(piece, value)
                del value  # before the next
            return model

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True
    ) -> IncompatibleKeys:
        """Load what `state_dict`, or the unmodified model's own, returned; on every rank.

        Args:
            strict: False loads what there is, such as adapters or masks alone, and leaves the rest
                as it is.

        Returns:
            ``missing_keys`` and ``unexpected_keys``, as torch does; with ``strict`` none.

        Raises:
            StateError: names (with ``strict``), shapes or kinds of dtypes differ, on any rank, or
                ranks have other names or values; nothing has been changed then, on none.
        """
        return self._load_state(state_dict, of_loss=False, strict=strict)

    def loss_state_dict(self) -> dict[str, Any]:
        """As `state_dict`, of a ``loss_fn`` that is a module, by its own names; else empty."""
        session = self._require()
        with self._world.guard("loss_state_dict()"):
            self._check_whole()
            return state_dicts.gather(session.state, session.buffers.stages, of_loss=True)

    def load_loss_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `loss_state_dict`, or the unmodified loss's own ``state_dict``, returned.

        Raises:
            StateError: names or shapes differ; nothing has been changed then.
        """
        self._load_state(state_dict, of_loss=True)

    # -- checkpoints ------------------------------------------------------------------------

    def save(
        self,
        directory: str | Path,
        *,
        data: Any = None,
        keep: int | None = None,
        async_save: bool = False,
        trainable_only: bool = False,
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
            trainable_only: leave out frozen parameters and buffers that no forward updates, which
                are as the model had them; of each the checkpoint has a checksum, by which `load`
                tells another base.

        Returns:
            The checkpoint's own folder.

        Raises:
            NotCompiledError: there is nothing to save before the first batch.
            OptionError: compiled with ``training=False``.
            CheckpointError: it cannot be written; those before it are as they were.
            OptionError: ``trainable_only=True`` where nothing is frozen.
        """
        self._check_training("save()", "; state_dict() has the weights")
        self._check_weights("save()")
        with self._world.guard(f"save({'trainable_only=True' if trainable_only else ''})"):
            training = self._training(data)
            self._check_whole()
            folder = self._checkpoints.save(
                training, Path(directory), keep, async_save, trainable_only
            )
        self.callbacks.tell("on_save", self, folder)
        return folder

    def load(self, directory: str | Path, *, data: Any = None, verify: bool = True) -> int:
        """Go on from a checkpoint, whatever stages and replicas it was saved under.

        One of weights alone is loaded as step 0, and the optimizer starts afresh.

        Args:
            directory: as `save` was given it, for its ``latest`` (or its newest, if that is
                missing); or the folder of one checkpoint.
            data: an object whose ``load_state_dict`` takes the position in the data.
            verify: compare the checksums of all that is read with those of what was written, and
                of a checkpoint that was saved with ``trainable_only=True`` those of the base too.

        Returns:
            After how many calls of `step` or `forward_backward` it was saved.

        Raises:
            NotCompiledError: before the first batch, when there is nothing to load into.
            CheckpointError: there is none, it is damaged or of something else; on every rank,
                and nothing has been changed.
        """
        checkpoints = self._checkpoints
        return self._loaded(
            data, lambda training: checkpoints.load(training, Path(directory), verify)
        )

    def _loaded(self, data: Any, load: Callable[[Training], Restore]) -> int:
        """`load`, by a function that reads."""
        session = self._require()
        self._check_weights("load()")
        with self._world.guard("load()"):
            restore = load(self._training(data))

            def finish() -> None:
                restore.finish()
                self._seed, self._steps = restore.seed, restore.steps
                self.zero_grad()
                session.refresh()

            self._change("load()", finish, CheckpointError)
        return self._steps

    def wait_for_save(self) -> None:
        """Wait until a save with ``async_save=True`` is on the disk; on every rank.

        Raises:
            CheckpointError: it failed.
        """
        with self._world.guard("wait_for_save()"):
            self._checkpoints.wait()

    # -- the inside -------------------------------------------------------------------------

    def _check_whole(self) -> None:
        """All ranks are here, and no run has failed that some had finished.

        Raises:
            PeerFailedError: one has.
        """
        self._world.agreement.together(self._world.transport.check)

    def _check_training(self, what: str, instead: str = "") -> None:
        """Raises OptionError where the pipeline was compiled for inference alone."""
        if not self._options.training:
            raise OptionError(
                f"{what} needs a pipeline that trains, and compile() was given training=False, "
                "which has no gradients and no optimizer: compile another one without that"
                f"{instead}"
            )

    def _check_weights(self, what: str) -> None:
        """Raises StateError where averages are in the place of the weights."""
        if self._require().state.swapped:
            raise StateError(
                f"{what} inside of `with average.swapped():`, where averages are in the place of "
                "the weights: train, save and load outside"
            )

    def _load_state(
        self, tensors: Mapping[str, Any], of_loss: bool, strict: bool = True
    ) -> IncompatibleKeys:
        session = self._require()
        call = "load_loss_state_dict()" if of_loss else "load_state_dict()"
        self._check_weights(call)
        with self._world.guard(call):
            chosen, keys = self._world.agreement.together(
                lambda: state_dicts.checked(session.state, tensors, of_loss, strict), StateError
            )
            self._check_given(call, chosen)

            def take_over() -> None:
                state_dicts.put(session.state, chosen)
                session.refresh()

            self._change(call, take_over, StateError)
            return keys

    def _change(self, call: str, act: Callable[[], None], kind: type[PipecompileError]) -> None:
        """The last part of a call that loads, of which all has been checked, on every rank.

        Raises:
            PipecompileError: it failed on one, as where memory is short; told by all. Parameters
                may be new on some ranks and old on others, so that nothing goes on between them.
        """

        def changed() -> None:
            try:
                act()
            except Exception as error:
                raise kind(
                    f"{call} failed while it changed the pipeline, parts of which are new now and "
                    "others as they were: free memory, and load again in new processes "
                    f"({type(error).__name__}: {error})"
                ) from error

        with self._world.changing(call, "changing the pipeline"):
            self._world.agreement.together(changed, kind)

    def _check_given(self, call: str, chosen: Mapping[str, torch.Tensor]) -> None:
        """Raises StateError where other ranks load other tensors: copies of them would differ."""
        mesh = self._world.mesh
        if mesh.rank is not None:
            check_values(call, chosen, self._world.agreement.gather, mesh.rank)

    def _training(self, data: Any) -> Training:
        """What a checkpoint is made of; the position in the data is that of the loaders made here,
        unless other data is given."""
        session = self._require()
        scaler = {} if self.loss_scaler is None else {"loss_scaler": self.loss_scaler}
        return Training(
            state=session.state,
            optimizer=session.optimizer,
            scheduler=session.scheduler,
            data=self._loaders if data is None else data,
            extras=self.checkpoint_extras | scaler,
            own=session.own.found,
            buffer_stages=session.buffers.stages,
            seed=self._seed,
            steps=self._steps,
            config=self._config,
            adapters=self._adapters,
            updated=session.updated,
        )

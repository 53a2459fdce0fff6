"""What of a pipeline stands between the gradients and the next step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import torch

from ..compiler.ir.errors import OptionError, StateError
from .monitor.meter import Meter
from .recording.recording import Recording
from .state import state_dict as state_dicts
from .stepping.averaging import AverageAll, AveragedWeights, AverageOne, average_of
from .stepping.clipping import GlobalNorm
from .stepping.early_stopping import EarlyStopping
from .stored import Stored
from .transport.doing import HERE


class Stepped(Stored):
    """The part of `Pipeline` that clips and drops gradients, and knows what steps parameters."""

    _recording: Recording
    _meter: Meter

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Scale all gradients so that their global norm is at most ``max_norm``.

        The norm is over all stages, each tied parameter counted once; it is returned, as it was
        before scaling, on every rank. The arithmetic is `torch.nn.utils.clip_grad_norm_`'s.

        Args:
            norm_type: 2, 1, another number above 0, or ``inf`` for the largest absolute value.
            error_if_nonfinite: where the norm is infinite or NaN raise, and change nothing;
                otherwise gradients become NaN or 0, as torch has it.

        Raises:
            OptionError: the norm is of no such kind.
            GradientError: the norm is not finite; on every rank.
        """
        if isinstance(norm_type, bool) or not isinstance(norm_type, (Real, str)):
            raise OptionError(f"norm_type={norm_type!r}: give 1, 2, inf or another number above 0")
        kind = _number("norm_type", norm_type)
        if not kind > 0:
            raise OptionError(f"norm_type={norm_type!r}: give 1, 2, inf or another number above 0")
        self._check_training("clip_grad_norm_()")
        session = self._require()
        call = f"clip_grad_norm_({_told(max_norm)}{'' if kind == 2 else f', norm_type={kind:g}'})"
        with self._world.guard(call), self._recording.closing("clip"):
            whole = GlobalNorm(session.state, kind, self._world.agreement.gather)
            norm = whole.clip(max_norm, error_if_nonfinite)
        self._meter.clipped(norm)
        return norm

    def clip_grad_value_(self, clip_value: float) -> None:
        """Clamp each element of all gradients to ±``clip_value``, as
        `torch.nn.utils.clip_grad_value_` does. Nothing is exchanged.

        Raises:
            OptionError: ``clip_value`` is negative or NaN.
        """
        most = _number("clip_value", clip_value)
        if not most >= 0:
            raise OptionError(f"clip_value={clip_value!r}: give 0 or more")
        self._check_training("clip_grad_value_()")
        self._require()
        with self._world.guard(f"clip_grad_value_({most:g})"), self._recording.closing("clip"):
            for param in self.parameters():
                if param.grad is not None:
                    param.grad.clamp_(min=-most, max=most)

    def zero_grad(self) -> None:
        """Drop all gradients (set ``.grad`` to None); on every rank.

        Raises:
            StateError: another thread is in a call of the pipeline.
        """
        with self._world.alone("zero_grad()"):
            if not HERE.inside:
                self._world.agreement.note("zero_grad()")
            for _, param in self.named_parameters():
                param.grad = None
            self._meter.cleared()
            if self.loss_scaler is not None:
                self.loss_scaler.end_step()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the parameters that this process holds."""
        self._check_training("pipe.optimizer")
        optimizer = self._require().optimizer
        if optimizer is None:
            raise OptionError("compile() was given no optimizer")
        return optimizer

    @property
    def lr_scheduler(self) -> Any:
        """What ``lr_scheduler=`` returned.

        Where its ``step`` needs a metric, as `ReduceLROnPlateau`'s does, `Pipeline.step` leaves
        it to you: call it with the same metric on every rank.
        """
        self._check_training("pipe.lr_scheduler")
        scheduler = self._require().scheduler
        if scheduler is None:
            raise OptionError("compile() was given no lr_scheduler")
        return scheduler

    def restart(
        self,
        state_dict: Mapping[str, Any],
        *,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None,
        lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    ) -> None:
        """Begin another training with what is compiled: as a pipeline of a model with these weights
        that has taken no step. Every rank must call it.

        Graphs, plan and programs stay, and so does what is yours: averages, positions of loaders,
        all ``checkpoint_extras``; and buffers that no state dict has.

        Args:
            state_dict: as `load_state_dict` takes it, such as `state_dict` before the first step.
            optimizer, lr_scheduler: as `compile` takes them; by default those that it was given.
                The optimizer is of the same class: stages and memory were planned for its states.

        Raises:
            OptionError: compiled with ``training=False``, or the optimizer is of another class.
            StateError: the state dict does not fit, or the pipeline is being traced. In any case
                nothing has been changed, on no rank, but for a lack of memory in the last part.
        """
        self._check_training("restart()")
        session, agreement = self._require(), self._world.agreement
        self._check_weights("restart()")
        if self._recording.log is not None:
            raise StateError("restart() inside of `with pipe.trace(...):`: leave that before")
        options = replace(
            self._options,
            optimizer=optimizer or self._options.optimizer,
            lr_scheduler=lr_scheduler or self._options.lr_scheduler,
        )
        with self._world.guard("restart()"):
            chosen = agreement.together(
                lambda: state_dicts.checked(session.state, state_dict)[0], StateError
            )
            self._check_given("restart()", chosen)
            stepping = agreement.together(lambda: session.stepping(options), OptionError)

            def begin_anew() -> None:
                state_dicts.put(session.state, chosen)
                session.begin(stepping)
                self._steps, self._meter.latest = 0, None
                self.zero_grad()
                if self.loss_scaler is not None:
                    self.loss_scaler.restart()
                session.refresh()

            self._change("restart()", begin_anew, StateError)

    # -- beside the steps -------------------------------------------------------------------

    def early_stopping(
        self,
        patience: int,
        *,
        min_delta: float = 0.0,
        mode: str = "min",
        name: str = "early_stopping",
    ) -> EarlyStopping:
        """Tells when a value no longer gets better; all ranks get one answer.

        ``if stopping.update(pipe.evaluate(loader)): break``. Its state is saved and loaded with the
        pipeline.

        Args:
            patience: how many values in a row may be no better than the best one.
            min_delta: by how much a better one is better at least.
            mode: "min" where less is better, "max" where more is.
            name: among ``checkpoint_extras``.

        Raises:
            OptionError: one of these is no such value, or the name is taken.
        """

        def agree(value: Any) -> list[Any]:
            with self._world.guard("update() of early_stopping()"):
                return self._world.agreement.gather(value)

        made = EarlyStopping(agree, patience, min_delta, mode)
        self._add_extra(name, made)
        return made

    def averaged(
        self,
        multi_avg_fn: AverageAll | None = None,
        *,
        avg_fn: AverageOne | None = None,
        name: str = "averaged",
    ) -> AveragedWeights:
        """Averages of the parameters over steps, as `torch.optim.swa_utils.AveragedModel` has them.

        ``average.update()`` after a step takes the weights in, on every rank; inside of ``with
        average.swapped():`` the pipeline evaluates with the averages. Each process averages what it
        holds, under every level of ZeRO. They are saved and loaded with the pipeline, under any
        stages and replicas. Buffers are the latest ones.

        Args:
            multi_avg_fn: such as ``torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)``; by default
                the plain mean.
            avg_fn: the same of a single parameter.
            name: among ``checkpoint_extras``.

        Raises:
            NotCompiledError: before the first batch, when there are no parameters.
            OptionError: an average does not treat every element alone, or the name is taken.
        """
        self._check_training("averaged()")
        session = self._require()

        def placed(there: bool) -> None:
            session.state.swapped = there
            session.refresh()

        trained = [param for param in self.parameters() if param.requires_grad]
        average, guard = average_of(multi_avg_fn, avg_fn), self._world.guard
        made = AveragedWeights(trained, average, guard, self._check_weights, placed)
        self._add_extra(name, made)
        return made

    def _add_extra(self, name: str, made: Any) -> None:
        if name in self.checkpoint_extras:
            raise OptionError(
                f"checkpoint_extras has a {name!r} already: give name= another one, or remove that"
            )
        self.checkpoint_extras[name] = made
        self._world.agreement.note(f"{type(made).__name__} {name!r}")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{name}={value!r} must be a number") from error


def _told(number: Any) -> str:
    """In the name of a call; one on a device is not waited for."""
    return f"{number:g}" if isinstance(number, Real) else ""


def factor_of(scale: Any) -> float:
    """``scale=`` of `forward_backward`.

    Raises:
        OptionError: it is no finite number.
    """
    factor = _number("scale", scale)
    if isinstance(scale, (bool, str)) or not math.isfinite(factor):
        raise OptionError(f"scale={scale!r} must be a finite number, such as 1 / 4")
    return factor

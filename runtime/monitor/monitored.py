"""The part of a pipeline that says what its steps did."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from ...compiler.ir.errors import StateError
from .callbacks import Callbacks
from .meter import Meter, lrs_of
from .metrics import Metrics


class Monitored:
    """What `Pipeline` has for metrics and callbacks.

    Attributes:
        callbacks: what rank 0 tells of steps, evaluations and saves; a list that may be changed.
    """

    callbacks: Callbacks
    _meter: Meter
    _steps: int

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        raise NotImplementedError

    def _alone(self, what: str) -> AbstractContextManager[None]:
        """A call of the user's, in which no other thread may be."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Calls of `step` or `forward_backward` so far, those before a resume included."""
        return self._steps

    @property
    def metrics(self) -> Metrics:
        """What the last step did: of `step`, or of a loop of your own that calls `end_step`.

        Raises:
            StateError: none has ended.
        """
        if self._meter.latest is None:
            raise StateError(
                "pipe.metrics before a step has ended: call step(), or end_step() in a loop of "
                "your own"
            )
        return self._meter.latest

    def get_lr(self) -> list[float]:
        """The learning rates that the next step takes, of the optimizer's groups.

        Raises:
            OptionError: compiled without ``optimizer=``.
        """
        return [float(lr) for lr in lrs_of(self.optimizer)]

    def end_step(self) -> Metrics:
        """A step of a loop of your own is over: its metrics, which callbacks are told, too.

        Call it where `step` would return: after the optimizer, the scheduler and `zero_grad`. Calls
        of `forward_backward` since the last one are this step's. On every rank; `step` does it by
        itself.

        Raises:
            StateError: `forward_backward` was not called since the last step, or another thread is
                in a call of the pipeline.
        """
        with self._alone("end_step()"):
            metrics = self._meter.end(self._steps)
        self.callbacks.tell("on_step", self, metrics)
        return metrics

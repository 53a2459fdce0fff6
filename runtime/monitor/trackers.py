"""Numbers of steps and evaluations for programs that draw them, where these are installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...compiler.ir.errors import OptionError
from .callbacks import Logger


def module_of(name: str, package: str, what: str) -> Any:
    """A module that is no part of pipecompile's own requirements.

    Raises:
        OptionError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OptionError(
            f"{what} needs {package}, which is not installed ({error}): pip install {package}"
        ) from error


class TensorBoard(Logger):
    """Scalars for TensorBoard: ``train/loss``, ``evaluate/accuracy``, by step.

    Args:
        folder: of the run. Points of a run before it that lie behind the first step which is
            written are taken away, as a resumed run writes them again.
        every: of so many steps one is written.

    Raises:
        OptionError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, every: int = 1):
        super().__init__(every)
        name = "torch.utils.tensorboard"
        self._writer_type = module_of(name, "tensorboard", "TensorBoard()").SummaryWriter
        self._folder = str(folder)
        self._writer: Any = None

    def write(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            self._writer = self._writer_type(self._folder, purge_step=step)
        for name, value in numbers.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def on_evaluate(self, pipe: Any, results: Mapping[str, Any]) -> None:
        super().on_evaluate(pipe, results)
        if self._writer is not None:
            self._writer.flush()


class WandB(Logger):
    """Weights & Biases: one `wandb.log` per step.

    Args:
        every: of so many steps one is logged.
        init: for `wandb.init`, which is called unless there is a run already.

    Raises:
        OptionError: wandb is not installed.
    """

    def __init__(self, every: int = 1, **init: Any):
        super().__init__(every)
        self._wandb, self._init = module_of("wandb", "wandb", "WandB()"), init

    def on_start(self, pipe: Any) -> None:
        if self._wandb.run is None:
            self._wandb.init(**self._init)

    def write(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        self._wandb.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)


class MLflow(Logger):
    """MLflow: `mlflow.log_metrics` into the active run; one is started where there is none.

    Args:
        every: of so many steps one is logged.
        start: for `mlflow.start_run`.

    Raises:
        OptionError: mlflow is not installed.
    """

    def __init__(self, every: int = 1, **start: Any):
        super().__init__(every)
        self._mlflow, self._start = module_of("mlflow", "mlflow", "MLflow()"), start

    def on_start(self, pipe: Any) -> None:
        if self._mlflow.active_run() is None:
            self._mlflow.start_run(**self._start)

    def write(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        named = {f"{kind}/{name}": float(value) for name, value in numbers.items()}
        self._mlflow.log_metrics(named, step=step)


class Neptune(Logger):
    """Neptune: points appended to series of a run.

    Args:
        run: a `neptune.Run` of yours; None makes one on rank 0.
        every: of so many steps one is logged.
        init: for `neptune.init_run`.

    Raises:
        OptionError: neptune is not installed.
    """

    def __init__(self, run: Any = None, every: int = 1, **init: Any):
        super().__init__(every)
        self._run, self._init = run, init
        self._neptune = None if run is not None else module_of("neptune", "neptune", "Neptune()")

    def on_start(self, pipe: Any) -> None:
        if self._neptune is not None and self._run is None:
            self._run = self._neptune.init_run(**self._init)

    def write(self, kind: str, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._run[f"{kind}/{name}"].append(value, step=step)

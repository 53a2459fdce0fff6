"""`transformers.Trainer` with a pipeline in the place of the model and its device.

The Trainer's own loop runs: its order of data, schedules, callbacks, logs and checkpoints. What a
subclass may replace is replaced where that is enough: `get_train_dataloader`, `create_optimizer`,
`get_batch_samples`, `training_step`, `prediction_step`, `evaluation_loop`, `save_model`. Methods
with an underscore are replaced where the Trainer would put the model on a device or wrap it
(`_move_model_to_device`, `_wrap_model`), make a gradient scaler (`_build_accelerator_args`), or
write and read what each process has a part of (`_save_optimizer_and_scheduler` and its kin).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from torch import nn

from ...compiler.api import compile
from ...compiler.costs.topology import ORDERS
from ...compiler.ir.errors import OptionError
from ...compiler.options.parsing import AUTO
from ..pipeline import Pipeline
from ..transport.mesh import make_mesh
from .alone import Skipped, alone, hand_over
from .arguments import settings_of
from .draws import undrawn
from .loading import Group, Share, grouped, peeked
from .losses import Loss, Smoothed, is_causal
from .meeting import Meeting
from .optimizers import check_optimizer, factory_of
from .standin import StandIn
from .steps import Amounts, Steps, first_rows
from .unread import told_unread
from .windows import Windows, rows_of

Trainer: Any = transformers.Trainer
FOLDER = "pipeline"  # of a Trainer's checkpoint: what the pipeline goes on from
_TRACED = ("compute_loss", "training_step", "create_optimizer", "create_optimizer_and_scheduler")


class PipelineTrainer(Trainer):  # type: ignore[misc]  # Any: its own types are too narrow
    """A Trainer whose model is trained by a pipeline of n_stages × dp ranks.

    Started by plain python, one process plays all ranks; by torchrun, each process one. Either way
    ``per_device_train_batch_size`` is of a replica, and ``gradient_accumulation_steps`` batches of
    it are the microbatches of a step. With one, `pipecompile.compile` chooses its microbatches.

    Args:
        args, kwargs: as `transformers.Trainer` takes them.
        pipeline: options of `pipecompile.compile`: ``{"n_stages": 2, "dp": 2}``.

    Attributes:
        pipe: the `pipecompile.Pipeline`; None before it is needed. ``model`` gets the trained
            weights at the end of `train`, and on the process that writes with each save.

    Raises:
        OptionError: an argument that a pipeline cannot honour, by name.
        WorldSizeError: torchrun started another number of processes.
    """

    pipe: Pipeline | None = None

    def __init__(self, *args: Any, pipeline: Mapping[str, Any], **kwargs: Any):
        given = inspect.signature(Trainer.__init__).bind_partial(self, *args, **kwargs).arguments
        asked = given.get("args") or transformers.TrainingArguments(output_dir="tmp_trainer")
        settings = self._settings = settings_of(asked, pipeline)
        for name in _TRACED:
            if getattr(type(self), name) is not getattr(PipelineTrainer, name):
                raise OptionError(
                    f"{type(self).__name__} overrides {name}(), which a pipeline does not call for "
                    "each batch: give compute_loss_func= for a loss, optimizer_cls_and_kwargs= for "
                    "an optimizer"
                )
        order = settings.options.get("placement", AUTO)
        mesh = make_mesh(settings.n_stages, settings.dp, (), ORDERS[0] if order == AUTO else order)
        replica = None if mesh.rank is None else mesh.replica_of(mesh.rank)
        self._rank, self._grouping = mesh.rank or 0, False
        together = settings.accumulation == 1
        self._meeting = Meeting()
        self._share = Share(settings.dp, replica, together, self._meeting.draw_alike)
        self._skipped = Skipped()
        self._left: list[Group] = []
        self._window: tuple[Any, Amounts] | None = None
        self._outputs: list[Any] = []
        self._rows, self._ran, self._flos = 0, False, 0
        options = {k: v for k, v in given.items() if k not in ("self", "args", "kwargs")}
        super().__init__(args=settings.args, **options)
        check_optimizer(self)
        self._steps = self._made_steps()
        self._stand_in = StandIn(self.model, self._end_step)

    def _made_steps(self) -> Steps:
        loss, takes = self.compute_loss_func, bool(self.model_accepts_loss_kwargs)
        if loss is None and self.label_smoother is not None:
            loss = Smoothed(self.label_smoother, is_causal(self.model))
        settings = self._settings
        windows = Windows() if settings.accumulation > 1 else None
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        adds = bool(takes or self.compute_loss_func is not None) if scaled is None else scaled
        reduced = settings.options["precision"] in ("bf16", "fp16")
        outside = None if loss is None else Loss(loss, reduced)
        return Steps(settings.accumulation, settings.dp, windows, outside, takes, adds, reduced)

    # -- the pipeline -----------------------------------------------------------------------

    def _compiled(self) -> Pipeline:
        """The pipeline; made for the first step of the training data, if there are any."""
        if self.pipe is not None:
            return self.pipe
        self.model.train()  # a pipeline trains in the mode that the model is in
        steps = self._steps
        given = dict(self._settings.options)
        if steps._windows is not None:
            given["cut"] = steps._windows
        if steps._loss is not None:
            given["loss_fn"] = steps._loss
        pipe = compile(self.model, **given, optimizer=factory_of(self))
        self._meeting.pipe = pipe
        if self._share.replica not in (None, pipe.data_shard):  # rows have been dealt to replicas
            raise OptionError(
                "the plan numbers ranks in another order than the Trainer deals rows in: give "
                'pipeline= its placement= as well, placement="replicas"'
            )
        if self.train_dataset is not None:
            with undrawn():
                groups = peeked(self.get_train_dataloader(), self._settings.accumulation)
            batch = steps.batch_of(groups, self._amounts(groups).items)
            with told_unread(self.model, self._settings.accumulation):
                pipe.compile_for(batch)
            self.optimizer = pipe.optimizer
        self.pipe = pipe
        return pipe

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The pipeline's, of what this process holds; the pipeline is made with it."""
        if self.optimizer is None:
            self.pipe = None
            self._compiled()
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_accelerator_and_postprocess(self) -> None:
        alone(self.args, self._rank)
        super().create_accelerator_and_postprocess()
        hand_over(
            self.accelerator, self._loader, self._clip, lambda data: first_rows(data, self._rows)
        )
        self.gather_function = self.accelerator.gather_for_metrics

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        made: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        return made | {"mixed_precision": "no"}  # the pipeline's own matter, and its scaler too

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """It stays: the pipeline copies to each device what its stages hold."""

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:
        self._compiled()
        self.accelerator._optimizers[:] = [self._skipped]
        return self._stand_in

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`; afterwards ``model`` has the trained weights."""
        alone(self.args, self._rank)
        result = super().train(*args, **kwargs)
        assert self.pipe is not None
        self.pipe.load_into(self.model)
        return result

    # -- data -------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """Of groups of batches, one batch per replica."""
        self._grouping = True
        try:
            return super().get_train_dataloader()
        finally:
            self._grouping = False

    def _loader(self, loader: Any) -> Any:
        return grouped(loader, self._share) if self._grouping else loader

    def get_total_train_batch_size(self, args: Any) -> int:
        return int(super().get_total_train_batch_size(args)) * self._settings.dp

    def get_batch_samples(
        self, epoch_iterator: Iterator[Group], num_batches: int, device: Any
    ) -> tuple[list[Any], Any]:
        """The groups of a step, and how many items its loss is a mean over, on all replicas."""
        groups = [group for _, group in zip(range(num_batches), epoch_iterator, strict=False)]
        self._left = list(groups)
        if not groups:
            return [], None
        amounts = self._amounts(groups)
        self._window = self._steps.batch_of(groups, amounts.items), amounts
        return groups, amounts.items

    def _amounts(self, groups: Sequence[Group]) -> Amounts:
        batches = [batch for group in groups for batch in group.batches]
        items = self._get_num_items_in_batch(batches, torch.device("cpu"))
        flos = sum(int(super(PipelineTrainer, self).floating_point_ops(b)) for b in batches)
        mine = None if items is None else float(items), len(batches), flos
        everyone = self._told_by_replicas(mine, "the items of a Trainer's step")
        told = [found for found, _, _ in everyone if found is not None]
        self._flos = sum(each for _, _, each in everyone)
        count = torch.tensor(math.fsum(told)) if told else None
        return Amounts(count, sum(number for _, number, _ in everyone))

    def _told_by_replicas(self, mine: Any, what: str) -> list[Any]:
        """What each replica has, one where one process plays them all. A collective."""
        told = dict(self._meeting.gather((self._share.replica, mine), what))
        return [told[replica] for replica in sorted(told)]

    # -- a step -----------------------------------------------------------------------------

    def training_step(
        self, model: Any, inputs: Group, num_items_in_batch: Any = None, *args: Any
    ) -> torch.Tensor:
        """Nothing, and no loss, until the last group of a step; then all of it, and the loss."""
        self._left.remove(inputs)
        if self._left or self._window is None:
            return torch.zeros((), device=self.args.device)
        pipe = self._compiled()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        batch, amounts = self._window
        self._window = None
        loss = self._steps.run(pipe, batch, amounts)
        self._ran = True
        scaler = pipe.loss_scaler
        self._skipped.step_was_skipped = scaler is not None and scaler.overflowed
        return loss.detach().to(self.args.device, torch.float32)

    def _clip(self, max_norm: float) -> torch.Tensor:
        if self._skipped.step_was_skipped:  # gradients were dropped
            return torch.tensor(math.nan)
        return self._compiled().clip_grad_norm_(max_norm)

    def _end_step(self) -> None:
        pipe = self._compiled()
        pipe.zero_grad()
        if self._ran:
            pipe.end_step()
        self._ran = False

    def floating_point_ops(self, inputs: Any) -> int:
        """Of all replicas in a step, told with its last group."""
        if not isinstance(inputs, Group):
            return int(super().floating_point_ops(inputs))
        return 0 if self._left else self._flos

    def _track_num_input_tokens(self, inputs: Group) -> None:
        if self.args.include_num_input_tokens_seen == "no":
            return
        before = self.state.num_input_tokens_seen
        for batch in inputs.batches:
            super()._track_num_input_tokens(batch)
        mine = self.state.num_input_tokens_seen - before
        told = self._told_by_replicas(mine, "the tokens of a Trainer's step")
        self.state.num_input_tokens_seen = before + sum(told)

    # -- evaluation -------------------------------------------------------------------------

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.evaluation_loop`; several batches run at once."""
        alone(self.args, self._rank)
        self._outputs = []
        return super().evaluation_loop(_Ahead(dataloader, self), *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """As `transformers.Trainer.prediction_step`, with the pipeline's outputs."""
        if not self._outputs:
            self._run_ahead([inputs])
        self._rows = rows_of(inputs)
        self._stand_in.output = self._outputs.pop(0)
        return super().prediction_step(self._stand_in, inputs, prediction_loss_only, ignore_keys)

    def _run_ahead(self, batches: Sequence[Any]) -> None:
        items = [self._get_num_items_in_batch([b], torch.device("cpu")) for b in batches]
        if not all(any(b.get(name) is not None for name in self.label_names) for b in batches):
            items = [None] * len(batches)
        found = self._steps.outputs(self._compiled(), batches, items)
        self._outputs += [send_to_device(each, self.args.device) for each in found]

    # -- checkpoints ------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A folder that ``from_pretrained`` opens; every rank calls it, and one writes."""
        if self.pipe is not None:
            self.pipe.load_into(self.model if self.args.should_save else None)
        super().save_model(output_dir, _internal_call)
        self._meeting.gather(None, "a Trainer's save_model()")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self._meeting.gather(None, "a Trainer's checkpoint")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._compiled().save(Path(output_dir) / FOLDER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (folder := Path(checkpoint) / FOLDER).is_dir():
            return
        self._compiled().load(folder)
        states = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(states)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.pipe is not None:
            self.pipe.load_state_dict(self.model.state_dict())

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._compiled().load_state_dict(self.model.state_dict())

    def _rank_folder(self, checkpoint: str) -> str:
        return str(Path(checkpoint) / f"rank_{self._rank}") if self._rank else checkpoint

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(self._rank_folder(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        own = None if checkpoint is None else self._rank_folder(checkpoint)
        super()._load_rng_state(own if own and Path(own).is_dir() else checkpoint)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        raise OptionError(
            "hyperparameter_search() would change arguments that the pipeline was compiled with: "
            "make a PipelineTrainer for each trial; the plan is kept, so that it starts in seconds"
        )


class _Ahead:
    """An evaluation's loader, whose batches run through the pipeline some at a time.

    Args:
        loader: what else it is asked for, such as its data set.
    """

    def __init__(self, loader: Any, trainer: PipelineTrainer):
        self._loader, self._trainer = loader, trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        batches: list[Any] = []
        for batch in self._loader:
            batches.append(batch)
            if len(batches) == self._trainer._steps.ahead:
                yield from self._run(batches)
                batches = []
        if batches:
            yield from self._run(batches)

    def _run(self, batches: Sequence[Any]) -> Iterator[Any]:
        self._trainer._run_ahead(batches)
        yield from batches

"""The optimizer that `TrainingArguments` ask for, of the parameters that a process holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...compiler.ir.errors import OptionError


def check_optimizer(trainer: Any) -> None:
    """Raises OptionError where the optimizer is none that a pipeline can make."""
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise OptionError(
            "optimizers=: an optimizer or a scheduler that is made already is of the model's "
            "parameters, and each process has its own: give optimizer_cls_and_kwargs=, or `optim` "
            "and `lr_scheduler_type` of TrainingArguments"
        )
    made, options = _asked(trainer)
    if not (isinstance(made, type) and issubclass(made, torch.optim.Optimizer)):
        raise OptionError(
            f"optim={trainer.args.optim!r} is made of the whole model, which no process has: use "
            "one of torch.optim's kind, such as optim='adamw_torch'"
        )
    whole = {"params", "model", "optimizer_dict"} & set(options)
    if whole or "bitsandbytes" in made.__module__:
        raise OptionError(
            f"optim={trainer.args.optim!r} looks into the whole model, which no process has: use "
            "one of torch.optim's kind, such as optim='adamw_torch'"
        )


@dataclass(frozen=True)
class Factory:
    """Makes the optimizer with the Trainer's two groups: weight decay by names, and none.

    It holds nothing of the Trainer: a pipeline knows its optimizer again by what it holds.
    """

    made: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    weight_decay: float
    decayed: tuple[str, ...]

    def __call__(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        trained, decayed = [each for each in named if each[1].requires_grad], set(self.decayed)
        groups = [
            {
                "params": [param for name, param in trained if (name in decayed) is decays],
                "weight_decay": self.weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ]
        make: Any = self.made
        optimizer: torch.optim.Optimizer = make(groups, **self.options)
        return optimizer


def factory_of(trainer: Any) -> Factory:
    """Of a Trainer's arguments."""
    made, options = _asked(trainer)
    decayed = tuple(trainer.get_decay_parameter_names(trainer.model))
    return Factory(made, options, trainer.args.weight_decay, decayed)


def _asked(trainer: Any) -> tuple[Any, dict[str, Any]]:
    if trainer.optimizer_cls_and_kwargs is not None:
        made, options = trainer.optimizer_cls_and_kwargs
    else:
        made, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    return made, dict(options)

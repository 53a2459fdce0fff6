"""The user's optimizer over this process's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ...compiler.profiling.standins import called
from ..state.model_state import ModelState


def make_optimizer(
    factory: Callable[[Iterable[Any]], torch.optim.Optimizer], state: ModelState
) -> torch.optim.Optimizer:
    """Call the factory with the named parameters that this process trains.

    A process without any (a stage whose parameters are all frozen) gets an optimizer over one
    empty parameter, so that schedulers and loops work there too.

    Raises:
        OptionError: the factory returned something else.
    """
    named = [(name, param) for name, param in state.named_parameters() if param.requires_grad]
    if not named:
        named = [("nothing_to_train_here", nn.Parameter(torch.empty(0)))]
    return called(factory, named)

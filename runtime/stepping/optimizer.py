"""The user's optimizer over this process's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ...compiler.profiling.standins import called, or_nothing
from ...compiler.profiling.touched_rows import steps_rows
from ..state.model_state import ModelState


def make_optimizer(
    factory: Callable[[Iterable[Any]], torch.optim.Optimizer], state: ModelState
) -> torch.optim.Optimizer:
    """Call the factory with the named parameters that this process trains, or one that is empty.

    Raises:
        OptionError: the factory returned something else.
    """
    named = [(name, param) for name, param in state.named_parameters() if param.requires_grad]
    if state.stepped_rows:
        factory = steps_rows(factory, state.stepped_rows)
    return called(factory, or_nothing(named))

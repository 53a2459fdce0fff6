"""What ``lr_scheduler=`` makes of an optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..ir.errors import OptionError


def make_scheduler(
    factory: Callable[[torch.optim.Optimizer], Any], optimizer: torch.optim.Optimizer
) -> Any:
    """Call the factory with the optimizer.

    Raises:
        OptionError: it returned no scheduler, or one of another optimizer.
    """
    scheduler = factory(optimizer)
    if not callable(getattr(scheduler, "step", None)) or isinstance(scheduler, type):
        kind = "None" if scheduler is None else f"a {type(scheduler).__name__}"
        raise OptionError(
            f"lr_scheduler= returned {kind}: give a function that takes the optimizer and returns "
            "its scheduler, such as functools.partial(LambdaLR, lr_lambda=...)"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise OptionError(
            "lr_scheduler= returned the scheduler of another optimizer, which would have no "
            "effect: make one of the optimizer that it is given"
        )
    return scheduler


def steps_alone(scheduler: Any) -> bool:
    """Whether ``step()`` needs no argument: that of `ReduceLROnPlateau` needs a metric."""
    try:
        inspect.signature(scheduler.step).bind()
    except TypeError:
        return False
    except ValueError:  # of a built-in, which does not say
        return True
    return True

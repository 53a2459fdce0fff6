"""How an optimizer goes on, for ranks to compare."""

from __future__ import annotations

from typing import Any

import torch

from ..exchange.alike import NO_PACE, Pace
from ..state.model_state import ModelState


def pace_of(optimizer: torch.optim.Optimizer | None, scheduler: Any, state: ModelState) -> Pace:
    """Before a step. Rates that lie on a device are not waited for."""
    if optimizer is None:
        return NO_PACE
    epoch = getattr(scheduler, "last_epoch", None)
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    told = not state.zero.matrices and not any(map(_is_far, rates))
    return Pace(
        epoch if isinstance(epoch, int) else None, tuple(map(float, rates)) if told else None
    )


def _is_far(rate: Any) -> bool:
    return isinstance(rate, torch.Tensor) and rate.device.type != "cpu"

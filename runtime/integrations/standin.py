"""What a Trainer holds where it would hold the model that it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Looks like the model to a Trainer's loop, and computes nothing.

    Args:
        model: whose parameters are counted, and whose name is asked for.
        ended: called where the loop drops gradients, which ends a step.

    Attributes:
        output: what the next call returns.
    """

    def __init__(self, model: nn.Module, ended: Callable[[], None]):
        super().__init__()
        self._told = (model, ended)  # in a tuple: no submodule
        self.output: Any = None

    def forward(self, **inputs: Any) -> Any:
        return self.output

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self._told[0].parameters(recurse)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._told[1]()

    def train(self, mode: bool = True) -> StandIn:
        return self

    def _get_name(self) -> str:
        return type(self._told[0]).__name__

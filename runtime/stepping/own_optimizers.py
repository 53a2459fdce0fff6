"""Optimizers that the user has made, seen when they step.

One of the pipeline's parameters has a state that a checkpoint should not lack. One of the model
that `compile` was given trains nothing, as the pipeline has a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...compiler.effects.outside import Originals
from ...compiler.ir.errors import OptionError

_watching: WeakSet[OwnOptimizers] = WeakSet()


class OwnOptimizers:
    """The optimizers that step one pipeline's parameters.

    Args:
        originals: the tensors of the model that it was compiled from.
        params: those of the pipeline.
        optimizer: the pipeline's.
    """

    def __init__(
        self,
        originals: Originals,
        params: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
    ):
        self._originals = {id(tensor()): tensor for tensor in originals.values()}
        self._params = {id(param): param for param in params.values()}
        self._optimizer = optimizer
        self._last: dict[int, ref[torch.optim.Optimizer]] = {}  # parameter -> what has stepped it
        _watching.add(self)

    @property
    def found(self) -> list[torch.optim.Optimizer]:
        """Those that were the last to step a parameter, without the pipeline's."""
        alive = {id(each): each for last in self._last.values() if (each := last()) is not None}
        return [each for each in alive.values() if each is not self._optimizer]

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped.

        Raises:
            OptionError: it has the parameters of the user's model, without gradients, while the
                gradients are in the pipeline's.
        """
        params = [param for group in optimizer.param_groups for param in group["params"]]
        mine = [id(param) for param in params if id(param) in self._params]
        self._last |= dict.fromkeys(mine, ref(optimizer))
        theirs = [param for param in params if self._is_original(param)]
        if not theirs or any(param.grad is not None for param in theirs):
            return
        if any(param.grad is not None for param in self._params.values()):
            raise OptionError(
                f"the {type(optimizer).__name__} has stepped parameters of the model that "
                "compile() was given, which have no gradients, as the pipeline trains copies: make "
                "it of pipe.parameters(), or give compile() optimizer="
            )

    def _is_original(self, param: torch.Tensor) -> bool:
        original = self._originals.get(id(param))
        return original is not None and original() is param


def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for pipeline in tuple(_watching):
        pipeline.stepped(optimizer)


register_optimizer_step_post_hook(_after)

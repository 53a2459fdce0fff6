"""What a model's parameters, buffers and optimizer take on a stage, whatever runs there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn

from .memory import Static, bucket_bytes
from .optimizer_cost import OptimizerMemory, optimizer_memory
from .precision import Precision
from .program import StageProgram


class Footprint:
    """Bytes by parameter name.

    Args:
        module: the model, its tensors fake.
        optimizer: the factory; None for no optimizer.
        precision: in which dtypes gradients add up.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None,
        precision: Precision | None = None,
    ):
        self._precision = precision
        self._optimizer = optimizer
        self._params = dict(module.named_parameters())
        self._buffers = sum(b.numel() * b.element_size() for b in module.buffers())
        self._memories: dict[tuple[str, ...], OptimizerMemory] = {}

    def size(self, name: str) -> tuple[int, int]:
        """(elements, bytes) of a parameter."""
        param = self._params[name]
        return param.numel(), param.numel() * param.element_size()

    def held_bytes(self, copies: Collection[str] = ()) -> dict[str, int]:
        """Parameter -> weight, its copy if it has one, gradient and optimizer states together."""
        states = self._memory(self._trainable(self._params)).state_bytes
        copy = self._precision.compute.itemsize if self._precision else 0
        return {
            name: param.numel()
            * (
                param.dtype.itemsize
                + (self._grad_dtype(param).itemsize if param.requires_grad else 0)
                + (copy if name in copies else 0)
            )
            + states.get(name, 0)
            for name, param in self._params.items()
        }

    def static(self, stage: StageProgram, batch_bytes: int, dp: int) -> Static:
        """What a stage holds all the time.

        Args:
            batch_bytes: of the stage's share of the batch, all microbatches.
        """
        trained = [self._params[n] for n in self._trainable(stage.params)]
        grads = [(param.numel(), self._grad_dtype(param)) for param in trained]
        copies = [(self._params[n].numel(), dtype) for n, dtype in stage.copies.items()]
        return Static(
            weights=sum(self.size(name)[1] for name in stage.params),
            copies=bucket_bytes(copies, dp),
            grads=bucket_bytes(grads, dp),
            states=self._memory(self._trainable(stage.params)).total_state_bytes,
            buffers=self._buffers,
            constants=stage.constant_bytes,
            batch=batch_bytes,
        )

    def optimizer_bytes(self, stage: StageProgram) -> int:
        """What the optimizer's step needs for a moment, gradients in the weights' dtype too."""
        names = self._trainable(stage.params)
        trained = [self._params[name] for name in names]
        widened = [p.nbytes for p in trained if self._grad_dtype(p) is not p.dtype]
        return self._memory(names).transient_bytes + sum(widened)

    def trainable(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The parameters among these that the optimizer steps, without data."""
        return {name: self._params[name] for name in self._trainable(names)}

    def _grad_dtype(self, param: torch.Tensor) -> torch.dtype:
        return self._precision.grads_of(param.dtype) if self._precision else param.dtype

    def _trainable(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if self._params[name].requires_grad)

    def _memory(self, names: tuple[str, ...]) -> OptimizerMemory:
        if self._optimizer is None or not names:
            return OptimizerMemory({}, 0, 0)
        if names not in self._memories:
            chosen = {name: self._params[name] for name in names}
            try:
                self._memories[names] = optimizer_memory(self._optimizer, chosen)
            except Exception:
                # the factory refuses these parameters, or is none: its own error comes where the
                # optimizer is made; a plan can do with the states of the usual one
                self._memories[names] = optimizer_memory(torch.optim.AdamW, chosen)
        return self._memories[names]

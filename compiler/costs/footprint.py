"""What a model's parameters, buffers and optimizer take on a stage, whatever runs there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..ir.precision import Precision
from ..ir.program import PipelineProgram, StageProgram
from ..ir.shards import (
    Item,
    closing_plan,
    parcels_of,
    row_range,
    shard_numel,
    stream_plan,
)
from .memory import Static, Traffic, bucket_bytes
from .optimizer_cost import OptimizerMemory, optimizer_memory


class Footprint:
    """Bytes by parameter name.

    Args:
        module: the model, its tensors fake.
        optimizer: the factory; None for no optimizer.
        precision: in which dtypes gradients add up.
        dp, zero: how many replicas divide what among themselves.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None,
        precision: Precision | None = None,
        dp: int = 1,
        zero: int = 0,
    ):
        self.dp, self.zero = dp, zero
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
        found = {}
        for name, param in self._params.items():
            shard = shard_numel(tuple(param.shape), self.dp)
            own, grad = param.dtype.itemsize, self._grad_dtype(param).itemsize
            count = shard if self._is_shard(name, name not in copies) else param.numel()
            held = count * own
            if name in copies and self.zero < 3:
                held += param.numel() * copy
            if param.requires_grad:
                held += (shard if self.zero >= 2 else param.numel()) * grad
            found[name] = held + states.get(name, 0)
        return found

    def static(self, stage: StageProgram, batch_bytes: int) -> Static:
        """What a stage holds all the time; where replicas divide it, what the first one holds.

        Args:
            batch_bytes: of the stage's share of the batch, all microbatches.
        """
        names = self._trainable(stage.params)
        trained = [self._params[name] for name in names]
        streams = self.zero >= 2
        grads = [
            (shard_numel(tuple(p.shape), self.dp) if streams else p.numel(), self._grad_dtype(p))
            for p in trained
        ]
        copied = stage.copies.items() if self.zero < 3 else ()
        copies = [(self._params[n].numel(), dtype) for n, dtype in copied]
        direct = stage.direct
        return Static(
            weights=sum(self._weight_bytes(name, name in direct) for name in stage.params),
            copies=bucket_bytes(copies, self.dp),
            grads=bucket_bytes(grads, 1 if streams else self.dp),
            states=self._memory(names).total_state_bytes,
            buffers=self._buffers,
            constants=stage.constant_bytes,
            batch=batch_bytes,
        )

    def optimizer_bytes(self, stage: StageProgram) -> int:
        """What the optimizer's step needs for a moment, gradients in the weights' dtype too."""
        names = self._trainable(stage.params)
        trained = [self._stepped(name) for name in names]
        widened = [p.nbytes for p in trained if self._grad_dtype(p) is not p.dtype]
        return self._memory(names).transient_bytes + sum(widened)

    def traffic(self, program: PipelineProgram, stage: int) -> Traffic:
        """What the exchange between replicas takes while a step runs."""
        code = program.stages[stage]
        if not self.zero:
            return Traffic()
        trained = {name: self._params[name] for name in self._trainable(code.params)}
        items = {n: Item(n, tuple(p.shape), self._grad_dtype(p)) for n, p in trained.items()}
        tied = [t.name for t in program.tied if stage in t.holders]
        if self.zero >= 2:
            plan = stream_plan(code, items, self.dp)
        else:
            plan = closing_plan(code, items, self.dp, tied)
        wholes: list[list[Item]] = [[], []]
        for name, param in trained.items() if self.zero < 3 else ():
            shape = tuple(param.shape)
            if name in code.direct:
                wholes[0].append(Item(name, shape, param.dtype))
            if name in code.copies:
                wholes[1].append(Item(name, shape, code.copies[name]))
        fetched = [p.gather_bytes for kind in wholes for p in parcels_of(kind, self.dp)]
        at_once = max((a + b for a, b in pairwise([0, *fetched])), default=0)
        return Traffic(plan, self.zero == 1, at_once, sum(fetched))

    def _is_shard(self, name: str, direct: bool) -> bool:
        """Whether a replica keeps its own rows of the weight alone."""
        trained = self._params[name].requires_grad
        return self.zero == 3 or (self.zero > 0 and trained and not direct)

    def _weight_bytes(self, name: str, direct: bool) -> int:
        param = self._params[name]
        if self._is_shard(name, direct):
            return shard_numel(tuple(param.shape), self.dp) * param.element_size()
        return param.numel() * param.element_size()

    def _stepped(self, name: str) -> torch.Tensor:
        """What the optimizer gets of a parameter, without data."""
        param = self._params[name]
        if not self.zero:
            return param
        shape = (row_range(tuple(param.shape), self.dp, 0)[1], *param.shape[1:])
        return torch.empty(shape if param.dim() else (), dtype=param.dtype, device="meta")

    def trainable(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The parameters among these that the optimizer steps, without data."""
        return {name: self._stepped(name) for name in self._trainable(names)}

    def _grad_dtype(self, param: torch.Tensor) -> torch.dtype:
        return self._precision.grads_of(param.dtype) if self._precision else param.dtype

    def _trainable(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if self._params[name].requires_grad)

    def _memory(self, names: tuple[str, ...]) -> OptimizerMemory:
        if self._optimizer is None or not names:
            return OptimizerMemory({}, 0, 0)
        if names not in self._memories:
            chosen = self.trainable(names)
            try:
                self._memories[names] = optimizer_memory(self._optimizer, chosen)
            except Exception:
                # the factory refuses these parameters, or is none: its own error comes where the
                # optimizer is made; a plan can do with the states of the usual one
                self._memories[names] = optimizer_memory(torch.optim.AdamW, chosen)
        return self._memories[names]

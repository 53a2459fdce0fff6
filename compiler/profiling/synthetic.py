"""Arguments to time a program with, made from what it was traced for.

Times depend on shapes, strides and dtypes, and hardly on values as long as these are ordinary:
small random numbers, zeros where an index is wanted, masks that mask nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ..ir.ops import Slot, add_gradient, add_rows
from ..ir.program import Port, Program, Role
from ..tensors.facts import extent

SCALE = 0.02  # what transformers initialise weights with
_NOISE = 1 << 20  # so many different numbers; more would take longer to draw than to use


class AddingSlot(Slot):
    """Adds gradients up as the runtime's slots do after a microbatch's first."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def add(self, grad: torch.Tensor) -> None:
        add_gradient(self.tensor, grad)

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self.tensor.addmm_(left, right)

    def add_rows(
        self, grad: torch.Tensor, ids: torch.Tensor, rows: int, padding: int, by_count: bool
    ) -> None:
        add_rows(self.tensor, grad, ids, padding, by_count)


class Synthesizer:
    """Makes arguments on a device.

    Args:
        batch: batch leaf -> a tensor to use as it is, where one is at hand.
    """

    def __init__(self, device: torch.device, batch: Sequence[torch.Tensor] = ()):
        self.device, self.batch = device, batch
        noise = torch.empty(_NOISE, device=device)
        self.noise = noise.normal_(0, SCALE, generator=torch.Generator(device).manual_seed(0))

    def arguments(
        self, program: Program, shared: Mapping[Port, Any], made: Collection[Port] = ()
    ) -> dict[Port, Any]:
        """An argument for each port of a program that is neither in ``shared`` nor in ``made``."""
        nodes = program.module.graph.find_nodes(op="placeholder")
        return {
            port: self._argument(port, node.meta.get("val"))
            for port, node in zip(program.inputs, nodes, strict=True)
            if port not in shared and port not in made
        }

    def _argument(self, port: Port, value: Any) -> Any:
        if port.role is Role.SEED:
            return 1
        if port.role is Role.SLOT:
            return AddingSlot(self.tensor(value))
        if port.role is Role.BATCH and int(port.key) < len(self.batch):
            return self.batch[int(port.key)].to(self.device)
        if not isinstance(value, torch.Tensor):
            return value  # a number that an operator returned
        made = self.tensor(value)
        return made.fill_(1) if port.role is Role.TANGENT else made

    def tensor(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape, strides and dtype, in memory of its own."""
        length = extent(like)
        if like.dtype.is_floating_point or like.dtype.is_complex:
            flat = torch.empty(length, dtype=like.dtype, device=self.device)
            for start in range(0, length, _NOISE):
                piece = flat[start : start + _NOISE]
                piece.copy_(self.noise[: piece.numel()])
        elif like.dtype is torch.bool:
            flat = torch.ones(length, dtype=like.dtype, device=self.device)
        else:
            flat = torch.zeros(length, dtype=like.dtype, device=self.device)
        return flat.as_strided(like.shape, like.stride())

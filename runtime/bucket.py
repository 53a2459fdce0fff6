"""Gradients of one stage: slots in one contiguous bucket, added to in place, reduced at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..compiler.memory import ALIGNMENT_BYTES
from .wire import is_dense


class GradSlot:
    """Where one parameter's gradient adds up: a view into the bucket in the parameter's layout.

    Attributes:
        fresh: nothing has been added since the gradients were cleared, so the next gradient is
            copied and not added, as autograd does it.
    """

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.fresh = True

    def add(self, grad: torch.Tensor) -> None:
        if self.fresh:
            self.tensor.copy_(grad)
            self.fresh = False
        else:
            if grad.stride() != self.tensor.stride():  # adding across layouts is up to 20× slower
                grad = torch.empty_like(self.tensor).copy_(grad)
            self.tensor.add_(grad)


class GradBucket:
    """The slots of one rank, in one buffer per dtype.

    Args:
        params: FQN -> the parameter whose shape, layout and dtype a slot takes.
        parts: every buffer's length is a multiple of this, so that it can be cut over replicas.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], device: torch.device, parts: int):
        self.slots: dict[str, GradSlot] = {}
        self.buffers: dict[torch.dtype, torch.Tensor] = {}
        for dtype in dict.fromkeys(param.dtype for param in params.values()):
            chosen = {name: p for name, p in params.items() if p.dtype is dtype}
            self.buffers[dtype] = self._fill(chosen, dtype, device, parts)

    def _fill(
        self,
        params: Mapping[str, nn.Parameter],
        dtype: torch.dtype,
        device: torch.device,
        parts: int,
    ) -> torch.Tensor:
        align = max(1, ALIGNMENT_BYTES // dtype.itemsize)
        offsets, end = {}, 0
        for name, param in params.items():
            offsets[name] = end
            end += -(-param.numel() // align) * align
        whole = -(-end // (align * parts)) * align * parts
        buffer = torch.zeros(whole, dtype=dtype, device=device)
        for name, param in params.items():
            room = buffer[offsets[name] : offsets[name] + param.numel()]
            if is_dense(tuple(param.shape), param.stride()):
                view = room.as_strided(param.shape, param.stride(), room.storage_offset())
            else:
                view = room.view(param.shape)
            self.slots[name] = GradSlot(view)
        return buffer

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())

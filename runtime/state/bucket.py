"""Buckets of one stage: what belongs to its parameters, in contiguous memory.

Gradients add up in slots (`gradients.py`); copies in the compute dtype are cast at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...compiler.ir.ops import Slot, add_gradient, add_rows, rows_gradient
from ...compiler.memory.rank_memory import ALIGNMENT_BYTES
from ..transport.wire import is_dense


class GradSlot(Slot):
    """Where one parameter's gradient adds up: a view into the bucket in the parameter's layout.

    Attributes:
        owned: the part of it that this rank's optimizer reads.
        fresh: nothing has been added since the gradients were cleared, so the next gradient is
            copied and not added, as autograd does it.
        closes: the mean over the replicas is taken once per step, and not per microbatch.
    """

    def __init__(self, tensor: torch.Tensor):
        self.tensor = self.owned = tensor
        self.fresh = True
        self.closes = False

    @property
    def sums(self) -> torch.Tensor:
        return self.tensor

    def clear(self) -> None:
        """Begin with zeros, so that every gradient is added: recorded programs cannot choose."""
        if self.fresh:
            self.tensor.zero_()
            self.fresh = False

    def add(self, grad: torch.Tensor, to: torch.Tensor | None = None) -> None:
        """Add a gradient, or rows of one to a part of the slot."""
        tensor = self.tensor if to is None else to
        if self.fresh:
            tensor.copy_(grad)
            self.fresh = False
        else:
            add_gradient(tensor, grad)

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        if self.tensor.dtype is not left.dtype:
            super().add_product(left, right)
        elif self.fresh:
            torch.mm(left, right, out=self.tensor)
            self.fresh = False
        else:
            self.tensor.addmm_(left, right)

    def add_rows(
        self, grad: torch.Tensor, ids: torch.Tensor, rows: int, padding: int, by_count: bool
    ) -> None:
        """Where no row is read, a whole gradient would add zeros: that changes no number."""
        if not self.fresh:
            add_rows(self.tensor, grad, ids, padding, by_count)
            return
        self.clear()
        numbers, made = rows_gradient(grad, ids, padding, by_count)
        self.tensor.index_copy_(0, numbers, made.to(self.tensor.dtype))


class Bucket:
    """A tensor beside each of some parameters, all in one buffer per dtype.

    Args:
        params: FQN -> the parameter whose shape and layout a view takes.
        dtypes: FQN -> the dtype of the view.
        parts: every buffer's length is a multiple of this, so that it can be cut over replicas.

    Attributes:
        views: FQN -> a view into a buffer.
    """

    def __init__(
        self,
        params: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
        parts: int,
    ):
        self.views: dict[str, torch.Tensor] = {}
        self.buffers: dict[torch.dtype, torch.Tensor] = {}
        for dtype in dict.fromkeys(dtypes[name] for name in params):
            chosen = {name: p for name, p in params.items() if dtypes[name] is dtype}
            self.buffers[dtype] = self._fill(chosen, dtype, device, parts)

    def _fill(
        self,
        params: Mapping[str, torch.Tensor],
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
            room = buffer[offsets[name] : offsets[name] + param.numel()]  # (elements,) -> its shape
            if is_dense(tuple(param.shape), param.stride()):
                view = room.as_strided(param.shape, param.stride(), room.storage_offset())
            else:
                view = room.view(param.shape)
            self.views[name] = view
        return buffer

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())

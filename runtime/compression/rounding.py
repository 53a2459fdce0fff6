"""Gradients in 16 or 8 bits a number, what rounding leaves over kept for the next step.

    [1] each replica adds what it has kept to its gradients, rounds them, and sends each row to
        its owner; what rounding took away is kept
    [2] an owner takes the mean of its rows in replicas' order, rounds it, and sends it to all;
        what that takes away it keeps too, as many times as there are replicas
    [3] all write the same rounded means

So the mean of what all replicas keep is just what has not reached the parameters yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from ...compiler.compression import sizes
from ...compiler.compression.rows import in_steps
from ...compiler.compression.sizes import ROW_BYTES
from ..transport.transport import Values, ordered_sum_
from .exchange import Rounds, Scatter, Share
from .packing import Kept


class Codec(Protocol):
    """Numbers in fewer bits.

    Attributes:
        row_bytes: of a row of `CHUNK` numbers.
    """

    row_bytes: int

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, CHUNK) -> (bytes,)."""
        ...

    def decode(self, data: torch.Tensor) -> torch.Tensor:
        """(bytes,) -> (rows, CHUNK), in fp32."""
        ...


class BFloat16:
    """Rounded to the nearest."""

    row_bytes = ROW_BYTES["bf16"]

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(torch.bfloat16).view(torch.uint8).view(-1)

    def decode(self, data: torch.Tensor) -> torch.Tensor:
        return data.view(torch.bfloat16).view(-1, sizes.CHUNK).float()


class Int8:
    """-127 to 127 times a scale of each row, which is a 127th of its largest number."""

    row_bytes = ROW_BYTES["int8"]

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        whole, scales = in_steps(rows)  # (rows, CHUNK), (rows, 1)
        return torch.cat([whole.view(-1).view(torch.uint8), scales.view(-1).view(torch.uint8)])

    def decode(self, data: torch.Tensor) -> torch.Tensor:
        count = data.numel() // self.row_bytes
        whole, scales = data[: count * sizes.CHUNK], data[count * sizes.CHUNK :].clone()
        return whole.view(torch.int8).view(count, sizes.CHUNK) * scales.view(torch.float32).view(
            -1, 1
        )


class Rounded(Kept):
    """Of one rank.

    Args:
        grads: FQN -> where its gradient is, in fp32.
    """

    def __init__(self, codec: Codec, grads: Mapping[str, torch.Tensor], dp: int, replica: int):
        super().__init__(sizes.CHUNK, grads)
        self._codec, self._dp, self._replica = codec, dp, replica
        self._owned = [self._packing.owned(dp, r) for r in range(dp)]

    def mean_(self, scale: float) -> Rounds:
        """Replace the gradients by their mean.

        Args:
            scale: what they have been multiplied by.
        """
        self._packing.add_(self._kept, 1 / scale)
        parts = yield Scatter([self._rounded(rows) for rows in self._owned])
        data = self._mean(parts)
        del parts
        lengths = [rows.numel() * self._codec.row_bytes for rows in self._owned]
        shared = yield Share(data, lengths)
        means = self._packing.zeros()
        for rows, given in zip(self._owned, shared, strict=True):
            means.index_copy_(0, rows, self._codec.decode(given))
        self._packing.write(means, scale)

    def _rounded(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as they are sent; the rest stays."""
        wide = self._kept.index_select(0, rows)
        data = self._codec.encode(wide)
        self._kept.index_copy_(0, rows, wide.sub_(self._codec.decode(data)))
        return data

    def _mean(self, parts: Values) -> torch.Tensor:
        """Of this replica's rows, as it is sent; the rest stays with the owner."""
        first = self._codec.decode(parts[0])
        total = ordered_sum_(first, [self._codec.decode(part) for part in parts[1:]])
        mean = total.div_(self._dp)
        data = self._codec.encode(mean)
        left = mean.sub_(self._codec.decode(data))
        self._kept.index_add_(0, self._owned[self._replica], left, alpha=self._dp)
        return data

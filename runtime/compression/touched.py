"""Gradients of tables of embeddings: replicas exchange the rows that have numbers, and no others.

    [1] each replica tells how many rows of each table it has, all decide alike from these numbers
    [2] it gives the others the numbers of these rows and what is in them, of tables for which that
        is less than their whole mean; other tables travel whole
    [3] all add up the rows in replicas' order, zeros where one has none, and divide

Just these additions makes an exchange of whole tables too, where no bit is set in a row that
no replica gives: 0 + 0 is 0. So the means have its bits, in every dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from ...compiler.compression.sizes import COUNT, NUMBER, rows_pay
from ...compiler.profiling.touched_rows import touched_rows
from ..transport.transport import Endpoint, Run, ordered_sum_
from .exchange import Mean, Rounds, Share, carry

Rows = tuple[torch.Tensor, torch.Tensor]
"""Numbers of rows, (rows,), rising, and what is in them, (rows, ...)."""


class Room(Protocol):
    """Where one table's gradient adds up.

    Attributes:
        views: FQN -> it; of this table alone.
        buffers: dtype -> the memory around it, whose length the replicas divide.
    """

    views: dict[str, torch.Tensor]
    buffers: dict[torch.dtype, torch.Tensor]


class TouchedRows:
    """Of one rank.

    Args:
        rooms: FQN -> where its gradient adds up.

    Attributes:
        views: FQN -> its gradient.
        buffers: the memory of all.
        sent_bytes: what this replica has given the others so far; in one process, what it would
            have.
    """

    def __init__(self, rooms: Mapping[str, Room], endpoint: Endpoint):
        self._endpoint = endpoint
        self.views = {name: room.views[name] for name, room in rooms.items()}
        self._buffers = {n: each for n, room in rooms.items() for each in room.buffers.values()}
        self.sent_bytes = 0

    @property
    def buffers(self) -> list[torch.Tensor]:
        return list(self._buffers.values())

    def mean_(self) -> Run:
        """Replace the gradients by their mean."""
        yield from carry(self._rounds(), self._endpoint, self._sent)

    def _sent(self, nbytes: int) -> None:
        self.sent_bytes += nbytes

    def _rounds(self) -> Rounds:
        dp = self._endpoint.dp
        touched = {name: touched_rows(grad) for name, grad in self.views.items()}
        mine = torch.tensor([len(rows) for rows in touched.values()])  # (tables,)
        told = yield Share(
            mine.view(torch.uint8).to(self._endpoint.device), [COUNT * len(mine)] * dp
        )
        counts = [each.cpu().clone().view(torch.int64).tolist() for each in told]
        by_rows: dict[str, list[int]] = {}
        for name, each in zip(self.views, zip(*counts, strict=True), strict=True):
            if rows_pay(max(each), self._row_bytes(name), self._buffers[name].nbytes, dp):
                by_rows[name] = list(each)
            else:
                yield Mean(self._buffers[name])
        if not by_rows:
            return
        packed = torch.cat([self._packed(name, touched[name]) for name in by_rows])
        sizes = [sum(self._size(n, each[r]) for n, each in by_rows.items()) for r in range(dp)]
        shared = yield Share(packed, sizes)
        parts = [self._unpacked(data, by_rows, r) for r, data in enumerate(shared)]
        for name in by_rows:
            self._take(self.views[name], [part[name] for part in parts])

    def _row_bytes(self, name: str) -> int:
        grad = self.views[name]
        return grad.nbytes // max(1, len(grad))

    def _size(self, name: str, rows: int) -> int:
        return rows * (NUMBER + self._row_bytes(name))

    def _packed(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows as they are sent, (bytes,)."""
        given = self.views[name].index_select(0, rows).contiguous()
        return torch.cat([_bytes(rows.to(torch.int32)), _bytes(given)])

    def _unpacked(
        self, data: torch.Tensor, counts: Mapping[str, Sequence[int]], replica: int
    ) -> dict[str, Rows]:
        found, at = {}, 0
        for name, each in counts.items():
            grad, count = self.views[name], each[replica]
            border, end = at + NUMBER * count, at + self._size(name, count)
            numbers = data[at:border].clone().view(torch.int32).long()  # (rows,)
            given = data[border:end].clone().view(grad.dtype)
            found[name], at = (numbers, given.view(count, *grad.shape[1:])), end
        return found

    @staticmethod
    def _take(grad: torch.Tensor, parts: Sequence[Rows]) -> None:
        """Write the mean of the replicas' rows over a gradient's."""
        union = torch.unique(torch.cat([numbers for numbers, _ in parts]))  # (rows,), rising

        def spread() -> Iterator[torch.Tensor]:
            for numbers, given in parts:
                room = given.new_zeros(len(union), *grad.shape[1:])
                yield room.index_copy_(0, torch.searchsorted(union, numbers), given)

        each = spread()
        mean = ordered_sum_(next(each), each).div_(len(parts))
        grad.index_copy_(0, union, mean)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)

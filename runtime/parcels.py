"""Parcels on their way between replicas: gradients to who owns their rows, parameters to all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..compiler.program import Port, Role
from ..compiler.shards import Entry, Item, Parcel, parcels_of
from .transport import Pending, Processes, Values, ordered_mean_

Settle = Callable[[Item, torch.Tensor], None]
"""Takes the mean of this rank's rows of an item."""


class Outgoing:
    """Sends parcels of gradients, and takes the mean of what arrives.

    A parcel leaves as soon as it is full, while the backward goes on. Before the next one leaves
    it is waited for: at most one is under way, and one is being filled.

    Args:
        settle: called with every item of this rank's rows, in the order in which they left.
    """

    def __init__(self, transport: Processes, rank: int, replica: int, settle: Settle):
        self._transport, self._rank, self._replica = transport, rank, replica
        self._settle_item = settle
        self._filling: torch.Tensor | None = None
        self._flying: tuple[Parcel, Pending] | None = None

    def put(self, entries: Sequence[Entry], grad: torch.Tensor) -> None:
        """Pack a gradient; what is full then leaves."""
        for parcel, number in entries:
            if number == 0:
                dtype = parcel.dtype
                self._filling = torch.empty(sum(parcel.sizes), dtype=dtype, device=grad.device)
            assert self._filling is not None
            _pack(parcel, number, grad, self._filling)
            if number == len(parcel.items) - 1:
                self._launch(parcel)

    def drain(self) -> None:
        """Wait for the last one."""
        if self._flying is None:
            return
        (parcel, pending), self._flying = self._flying, None
        replica, size = self._replica, parcel.sizes[self._replica]
        (room,) = pending.wait()
        first, *others = torch.split(room, size) if size else (room,)
        mean = ordered_mean_(first, others)
        for item, at in zip(parcel.items, parcel.offsets[replica], strict=True):
            self._settle_item(item, mean[at : at + item.numel(parcel.dp, replica)])

    def _launch(self, parcel: Parcel) -> None:
        self.drain()
        assert self._filling is not None
        blocks, self._filling = self._filling, None
        self._flying = parcel, self._transport.scatter(self._rank, blocks, parcel.sizes)


def _pack(parcel: Parcel, number: int, grad: torch.Tensor, blocks: torch.Tensor) -> None:
    item, start = parcel.items[number], 0
    for replica in range(parcel.dp):
        rows = item.rows(grad, parcel.dp, replica)
        at = start + parcel.offsets[replica][number]
        blocks[at : at + rows.numel()].view(rows.shape).copy_(rows)
        start += parcel.sizes[replica]


class Gathering:
    """Makes parameters whole from the rows of all replicas.

    Args:
        masters: name -> this rank's rows.
        like: name -> a tensor of the whole parameter's shape, strides and dtype.
    """

    def __init__(
        self,
        transport: Processes,
        rank: int,
        replica: int,
        masters: Mapping[str, torch.Tensor],
        like: Mapping[str, torch.Tensor],
    ):
        self._transport, self._rank, self._replica = transport, rank, replica
        self._masters, self.like = masters, like
        self.device = next(iter(masters.values())).device

    def start(self, parcel: Parcel) -> Pending:
        """Send this rank's rows, cast to the parcel's dtype."""
        mine = torch.empty(max(parcel.sizes), dtype=parcel.dtype, device=self.device)
        for item, at in zip(parcel.items, parcel.offsets[self._replica], strict=True):
            rows = item.own_rows(self._masters[item.name].detach(), parcel.dp, self._replica)
            mine[at : at + rows.numel()].view(rows.shape).copy_(rows)
        return self._transport.gather(self._rank, mine)

    def finish(self, parcel: Parcel, pending: Pending, whole: Sequence[torch.Tensor]) -> None:
        """Wait, and write all replicas' rows of each item."""
        (room,) = pending.wait()
        for replica, block in enumerate(torch.split(room, max(parcel.sizes))):
            for item, at, target in zip(parcel.items, parcel.offsets[replica], whole, strict=True):
                rows = item.rows(target, parcel.dp, replica)
                rows.copy_(block[at : at + rows.numel()].view(rows.shape))


class GatheredGroup:
    """A group of parameters that a program makes whole, from rows of all replicas."""

    def __init__(
        self,
        gathering: Gathering,
        ports: Sequence[Port],
        copies: Mapping[str, torch.dtype],
        dp: int,
    ):
        self._gathering, self._ports = gathering, ports
        self._dtypes = [
            copies[str(p.key)] if p.role is Role.COPY else gathering.like[str(p.key)].dtype
            for p in ports
        ]
        shapes = [tuple(gathering.like[str(port.key)].shape) for port in ports]
        named = zip(ports, shapes, self._dtypes, strict=True)
        items = [Item(str(port.key), shape, dtype) for port, shape, dtype in named]
        self._parcels = parcels_of(items, dp, whole=True)

    def start(self) -> list[tuple[Parcel, Pending]]:
        return [(parcel, self._gathering.start(parcel)) for parcel in self._parcels]

    def finish(self, ticket: list[tuple[Parcel, Pending]]) -> tuple[torch.Tensor, ...]:
        made = []
        for port, dtype in zip(self._ports, self._dtypes, strict=True):
            like = self._gathering.like[str(port.key)]
            made.append(torch.empty_like(like, dtype=dtype, device=self._gathering.device))
        for parcel, pending in ticket:
            whole = [t for t, d in zip(made, self._dtypes, strict=True) if d is parcel.dtype]
            self._gathering.finish(parcel, pending, whole)
        return tuple(made)


class LocalGroup:
    """The same where ranks of one process share whole parameters."""

    def __init__(self, whole: Values):
        self._whole = tuple(whole)

    def start(self) -> None:
        return None

    def finish(self, ticket: None) -> tuple[torch.Tensor, ...]:
        return self._whole

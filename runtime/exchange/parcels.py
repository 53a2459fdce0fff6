"""Parcels on their way between replicas: gradients to who owns their rows, parameters to all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ...compiler.ir.program import Port, Role
from ...compiler.ir.shards import Entry, Item, Owners, Parcel, apart, item_of, parcels_of
from ..transport.processes import Processes
from ..transport.transport import Pending, ordered_sum_

Settle = Callable[[Item, torch.Tensor], None]
"""Takes the sum over the replicas of this rank's rows of an item."""


class Outgoing:
    """Sends parcels of gradients, and adds up what arrives, in rank order.

    A parcel leaves as soon as it is full, while the backward goes on. Before the next one leaves
    it is waited for: at most one is under way, and one of each stage is being filled.

    Args:
        settle: called with every item of this rank's rows, in the order in which they left.
    """

    def __init__(self, transport: Processes, settle: Settle):
        self._transport, self._replica, self._settle = transport, transport.replica, settle
        self._filling: dict[int, list[torch.Tensor]] = {}  # by id of the parcel
        self._flying: tuple[Parcel, torch.Tensor, Pending] | None = None

    def put(self, entries: Sequence[Entry], grad: torch.Tensor) -> None:
        """Pack a gradient; what is full then leaves."""
        for parcel, number in entries:
            if number == 0:
                self._filling[id(parcel)] = self._empty(parcel, grad.device)
            _pack(parcel, number, grad, self._filling[id(parcel)])
            if number == len(parcel.items) - 1:
                self._launch(parcel)

    def drain(self) -> None:
        """Wait for the last one."""
        if self._flying is None:
            return
        (parcel, own, pending), self._flying = self._flying, None
        parts = pending.wait()  # dp - 1 × (elements,)
        parts.insert(self._replica, own)
        total = ordered_sum_(parts[0], parts[1:])  # (elements,) of this rank's rows of all items
        for item, at in zip(parcel.items, parcel.offsets[self._replica], strict=True):
            self._settle(item, total[at : at + item.numel(parcel.dp, self._replica)])

    def _empty(self, parcel: Parcel, device: torch.device) -> list[torch.Tensor]:
        """Per replica a block, (its elements,); last the others' blocks as one tensor."""
        own, sizes = parcel.sizes[self._replica], list(parcel.sizes)
        sizes[self._replica] = 0
        others = torch.empty(sum(sizes), dtype=parcel.dtype, device=device)
        blocks = list(torch.split(others, sizes))
        blocks[self._replica] = torch.empty(own, dtype=parcel.dtype, device=device)
        return [*blocks, others]

    def _launch(self, parcel: Parcel) -> None:
        self.drain()
        *blocks, others = self._filling.pop(id(parcel))
        pending = self._transport.replicas.scatter(others, parcel.sizes)
        self._flying = parcel, blocks[self._replica], pending


def _pack(parcel: Parcel, number: int, grad: torch.Tensor, blocks: Sequence[torch.Tensor]) -> None:
    item = parcel.items[number]
    for replica in range(parcel.dp):
        # (rows, ...) of a gradient (all rows, ...) -> (rows · ...,) of a block
        rows, at = item.rows(grad, parcel.dp, replica), parcel.offsets[replica][number]
        blocks[replica][at : at + rows.numel()].view(rows.shape).copy_(rows)


class Gathering:
    """Makes parameters whole from the rows of all replicas.

    Args:
        masters: name -> this rank's rows.
        like: name -> a tensor of the whole parameter's shape, strides and dtype.
        owners: of those that one replica has all rows of.
        device: of the rank, which may have no parameters.
    """

    def __init__(
        self,
        transport: Processes,
        masters: Mapping[str, torch.Tensor],
        like: Mapping[str, torch.Tensor],
        owners: Owners,
        device: torch.device,
    ):
        self._transport, self._replica, self.dp = transport, transport.replica, transport.dp
        self._masters, self.like, self.owners = masters, like, owners
        self.device = device

    def start(self, parcel: Parcel) -> Pending:
        """Send this rank's rows, cast to the parcel's dtype."""
        if parcel.owned:
            # (elements,) of all blocks, which are of different sizes
            room = torch.empty(sum(parcel.sizes), dtype=parcel.dtype, device=self.device)
            blocks = torch.split(room, list(parcel.sizes))
            self._pack(parcel, blocks[self._replica])
            return self._transport.replicas.share(room, blocks)
        # (elements,): as many as the largest block has, so that all are of one size
        mine = torch.empty(max(parcel.sizes), dtype=parcel.dtype, device=self.device)
        self._pack(parcel, mine)
        return self._transport.replicas.gather(mine)

    def _pack(self, parcel: Parcel, mine: torch.Tensor) -> None:
        for item, at in zip(parcel.items, parcel.offsets[self._replica], strict=True):
            rows = item.own_rows(self._masters[item.name].detach(), parcel.dp, self._replica)
            mine[at : at + rows.numel()].view(rows.shape).copy_(rows)

    def start_into(self, name: str, whole: torch.Tensor) -> Pending:
        """Send this rank's rows of a parameter, and receive all of them where they belong."""
        rows = self._masters[name].detach().to(whole.dtype)
        return self._transport.replicas.gather_into(rows.view(-1), whole.view(-1))

    def finish(self, parcel: Parcel, pending: Pending, whole: Sequence[torch.Tensor]) -> None:
        """Wait, and write all replicas' rows of each item."""
        for replica, block in enumerate(pending.wait()):  # (elements,)
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
    ):
        self._gathering = gathering
        like = {port: _whole(gathering, port, copies) for port in ports}
        self._direct, self._rest = apart(like, gathering.dp, _owned(ports, gathering.owners))
        items = [item_of(str(port.key), w, gathering.owners) for port, w in self._rest.items()]
        self._parcels = parcels_of(items, gathering.dp, whole=True)

    def start(self) -> list[Any]:
        rooms = self._rooms(self._direct.values())
        direct = [
            self._gathering.start_into(str(port.key), room)
            for port, room in zip(self._direct, rooms, strict=True)
        ]
        parcels = [(parcel, self._gathering.start(parcel)) for parcel in self._parcels]
        return [(direct, parcels), *rooms]

    def finish(self, ticket: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        direct, parcels = ticket[0]
        made = self._rooms(self._rest.values())
        for parcel, pending in parcels:
            whole = [tensor for tensor in made if tensor.dtype is parcel.dtype]
            self._gathering.finish(parcel, pending, whole)
        for pending in direct:
            pending.wait()
        return tuple(made)

    def _rooms(self, like: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.empty_like(whole, device=self._gathering.device) for whole in like]


def _owned(ports: Iterable[Port], owners: Owners) -> list[Port]:
    return [port for port in ports if port.key in owners]


def _whole(gathering: Gathering, port: Port, copies: Mapping[str, torch.dtype]) -> torch.Tensor:
    """What a port of a group stands for, without data."""
    name = str(port.key)
    dtype = copies[name] if port.role is Role.COPY else None
    return torch.empty_like(gathering.like[name], dtype=dtype)


class LocalGroup:
    """The same where ranks of one process share whole parameters."""

    def __init__(self, whole: Mapping[Port, torch.Tensor], dp: int, owners: Owners):
        self._direct, self._rest = apart(whole, dp, _owned(whole, owners))

    def start(self) -> list[Any]:
        return [None, *self._direct.values()]

    def finish(self, ticket: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        return tuple(self._rest.values())

"""Parcels on their way between replicas: gradients to who owns their rows, parameters to all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ...compiler.ir.program import Port, Role
from ...compiler.ir.shards import Entry, Item, Owners, Parcel, apart, item_of, parcels_of
from ..transport.processes import Processes
from ..transport.replicas import Room
from ..transport.transport import Pending, ordered_sum_

Settle = Callable[[Item, torch.Tensor], None]
"""Takes the sum over the replicas of this rank's rows of an item."""
Own = Callable[[Item], torch.Tensor]
"""This rank's rows of an item that stays, which may be overwritten."""


class Outgoing:
    """Sends parcels of gradients, and adds up what arrives, in rank order.

    A parcel leaves as soon as it is full, while the backward goes on. Before the next one leaves
    it is waited for: at most one is under way, and one of each stage is being filled.

    Args:
        settle: called with every item of this rank's rows, in the order in which they left.
    """

    def __init__(self, transport: Processes, settle: Settle, own: Own):
        self._replicas, self._replica = transport.replicas, transport.replica
        self._settle, self._own = settle, own
        self._filling: dict[int, tuple[Room, torch.Tensor | None]] = {}  # by id of the parcel
        self._flying: tuple[Parcel, torch.Tensor | None, Pending] | None = None

    def put(self, entries: Sequence[Entry], grad: torch.Tensor) -> None:
        """Pack a gradient; what is full then leaves."""
        for parcel, number in entries:
            if number == 0:
                self._filling[id(parcel)] = self._empty(parcel, grad.device)
            self._pack(parcel, number, grad)
            if number == len(parcel.items) - 1:
                self._launch(parcel)

    def drain(self) -> None:
        """Wait for the last one."""
        if self._flying is None:
            return
        (parcel, own, pending), self._flying = self._flying, None
        parts = pending.wait()  # dp - 1 × (elements,)
        if own is not None:
            parts.insert(self._replica, own)
            parts = [ordered_sum_(parts[0], parts[1:])]  # (elements,) of this rank's rows of all
        for item, at in zip(parcel.items, parcel.offsets[self._replica], strict=True):
            here = slice(at, at + item.numel(parcel.dp, self._replica))
            if own is not None:
                self._settle(item, parts[0][here])
                continue
            rows = self._own(item)
            terms = [part[here].view(rows.shape) for part in parts]
            terms.insert(self._replica, rows)
            self._settle(item, ordered_sum_(terms[0], terms[1:]))

    def _empty(self, parcel: Parcel, device: torch.device) -> tuple[Room, torch.Tensor | None]:
        """Blocks for the others, and one for this replica's own rows, (its elements,) each."""
        sizes, own = list(parcel.sizes), None
        if not parcel.stays:
            own = torch.empty(sizes[self._replica], dtype=parcel.dtype, device=device)
        return self._replicas.room(sizes, parcel.dtype, device), own

    def _launch(self, parcel: Parcel) -> None:
        self.drain()
        room, own = self._filling.pop(id(parcel))
        self._flying = parcel, own, self._replicas.scatter(room)

    def _pack(self, parcel: Parcel, number: int, grad: torch.Tensor) -> None:
        item, (room, own) = parcel.items[number], self._filling[id(parcel)]
        for replica in range(parcel.dp):
            block = own if replica == self._replica else room.blocks[replica]
            if block is not None:
                # (rows, ...) of a gradient (all rows, ...) -> (rows · ...,) of a block
                rows, at = item.rows(grad, parcel.dp, replica), parcel.offsets[replica][number]
                block[at : at + rows.numel()].view(rows.shape).copy_(rows)


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
        sizes = parcel.sizes
        if not parcel.owned:  # as many as the largest block has, so that all are of one size
            sizes = (max(sizes),) * self.dp
        write = partial(self._pack, parcel)
        return self._transport.replicas.publish(sizes, parcel.dtype, self.device, write)

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
                if replica != self._replica:
                    rows.copy_(block[at : at + rows.numel()].view(rows.shape))
                    continue
                mine = item.own_rows(self._masters[item.name].detach(), parcel.dp, replica)
                if mine.data_ptr() != rows.data_ptr():  # else it is a part of the whole
                    rows.copy_(mine)


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

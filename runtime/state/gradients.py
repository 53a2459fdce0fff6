"""Where the gradients of one rank add up, and how replicas exchange them.

=================  ===========================================================================
`WholeGradients`   all rows on every replica; one mean per step. zero=0, and zero=1 where ranks
                   share a process
`ClosingGradients` all rows until the last microbatch, whose backward sends them to their owners
`StreamGradients`  a replica's own rows alone: what a backward makes leaves at once (zero=2, 3)
`SharedGradients`  the same sums where the replicas of a stage share a process
=================  ===========================================================================

Every sum over replicas is taken in rank order, so processes and ranks of one process agree bit
for bit. At levels 2 and 3 the replicas' mean is added up per microbatch, not taken of the sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from ...compiler.compression.methods import Method
from ...compiler.ir.actions import Kind
from ...compiler.ir.precision import REDUCED
from ...compiler.ir.program import StageProgram
from ...compiler.ir.shards import (
    Departures,
    Entry,
    Item,
    Owners,
    closing_departures,
    item_of,
    items_of,
    rows_of,
    stream_departures,
)
from ..compression.compressed import DTYPE, Compressed
from ..exchange.parcels import Outgoing
from ..transport.processes import Processes
from ..transport.transport import Endpoint, Loopback, Run, add_mean_, ordered_sum_
from .bucket import Bucket, GradSlot


class WholeGradients(Bucket):
    """One slot per parameter of the rank's stages, in a buffer per dtype.

    Attributes:
        slots: FQN -> where the gradient is once it is complete.
        inlets: FQN -> what programs add to.
        leads: whether ``slots`` are this rank's own.
        closes: gradients leave while the last microbatch's are made.
        compressed: the exchange of those in fp32, where they are compressed.
    """

    leads, closes = True, False

    def __init__(
        self,
        params: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
        endpoint: Endpoint,
        parts: int,
        compress: Method | None = None,
    ):
        super().__init__(params, dtypes, endpoint.device, parts)
        self._endpoint = endpoint
        self.compressed: Compressed | None = None
        if compress is not None and endpoint.dp > 1:
            self.compressed = Compressed(compress, self.views, endpoint)
        self.slots = {name: GradSlot(view) for name, view in self.views.items()}
        self.inlets: Mapping[str, GradSlot | Inlet] = self.slots

    def departures(self, stage: StageProgram, late: Mapping[str, bool]) -> Departures:
        """What leaves when, while a stage program runs.

        Args:
            late: `compiler.ir.shards.late_gradients`.
        """
        return Departures()

    def begin(self, departures: Departures, part: Kind, last: bool) -> None:
        """Before a backward program; ``last``: of the last microbatch."""

    def collect(self) -> Run:
        """After a backward program (REDUCE_B, REDUCE_W)."""
        yield from ()

    def reduce(self, departures: Departures, last: bool) -> Run:
        """After all of a stage (REDUCE_GRAD); ``last``: of the rank's stages.

        Then every slot has the mean over the replicas.
        """
        compressed = self.compressed if last else None
        if compressed is not None:
            yield from compressed.mean_()
        for dtype, buffer in self.buffers.items() if last else ():
            if compressed is not None and dtype is DTYPE:
                continue
            pending = self._endpoint.mean(buffer)
            while not pending.ready():
                yield
            pending.wait()

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply the gradients, but for those that add up in a reduced dtype."""
        for tensor in self._owned():
            if tensor.dtype not in REDUCED:
                tensor.mul_(factor)

    @torch.no_grad()
    def clear(self) -> None:
        for tensor in self._owned():
            tensor.zero_()

    def abandon(self) -> None:
        """Forget what a run that failed has made and nobody has taken."""

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether no gradient is infinite or NaN."""
        owned = (torch.view_as_real(t) if t.is_complex() else t for t in self._owned())
        ends = [end for tensor in owned if tensor.numel() for end in torch.aminmax(tensor)]
        return all(bool(torch.isfinite(end)) for end in ends)

    def _owned(self) -> list[torch.Tensor]:
        return list(self.buffers.values())


class Inlet:
    """Takes the gradients of one parameter on behalf of a bucket that exchanges them."""

    def __init__(self, bucket: SentGradients | SharedGradients, name: str):
        self._bucket, self._name = bucket, name

    def add(self, grad: torch.Tensor) -> None:
        self._bucket.take(self._name, grad)


class SentGradients(WholeGradients, ABC):
    """What leaves in parcels, between processes, while a backward runs."""

    def __init__(
        self,
        params: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
        endpoint: Endpoint,
        parts: int,
    ):
        super().__init__(params, dtypes, endpoint, parts)
        transport = endpoint.transport
        assert isinstance(transport, Processes)
        self._dp, self._replica = endpoint.dp, endpoint.replica
        self.inlets = {name: Inlet(self, name) for name in self.slots}
        self._outgoing = Outgoing(transport, self._settle)
        self._leaving: list[tuple[Entry, ...]] = []

    def begin(self, departures: Departures, part: Kind, last: bool) -> None:
        self._leaving = list(departures.parts.get(part, ()))[::-1]

    def take(self, name: str, grad: torch.Tensor) -> None:
        self._outgoing.put(self._leaving.pop(), grad)

    def reduce(self, departures: Departures, last: bool) -> Run:
        for name, entries in departures.closing.items():
            self._outgoing.put(entries, self.slots[name].tensor)
        self._outgoing.drain()
        yield from ()

    @abstractmethod
    def _settle(self, item: Item, total: torch.Tensor) -> None:
        """Take the sum over the replicas of this rank's rows."""


class ClosingGradients(SentGradients):
    """zero=1: the mean of a replica's rows is written over these, and the others are left."""

    closes = True

    def __init__(
        self,
        params: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
        endpoint: Endpoint,
        owners: Owners,
    ):
        super().__init__(params, dtypes, endpoint, endpoint.dp)
        self._owners = owners
        for name, slot in self.slots.items():
            slot.owned = rows_of(slot.tensor, self._dp, self._replica, owners.get(name))

    def departures(self, stage: StageProgram, late: Mapping[str, bool]) -> Departures:
        slots = {name: slot.tensor for name, slot in self.slots.items()}
        return closing_departures(stage, items_of(slots, self._owners), self._dp, late)

    def begin(self, departures: Departures, part: Kind, last: bool) -> None:
        super().begin(departures if last else Departures(), part, last)

    def take(self, name: str, grad: torch.Tensor) -> None:
        slot = self.slots[name]
        slot.add(grad)
        if self._leaving:
            super().take(name, slot.tensor)

    def _settle(self, item: Item, total: torch.Tensor) -> None:
        rows = item.rows(self.slots[item.name].tensor, self._dp, self._replica)
        add_mean_(rows, total.view(rows.shape), self._dp, fresh=True)

    def _owned(self) -> list[torch.Tensor]:
        return [slot.owned for slot in self.slots.values()]


class StreamGradients(SentGradients):
    """zero=2 and 3: slots have a replica's own rows.

    Args:
        shards: FQN -> this rank's rows of the parameter.
        whole: FQN -> a tensor of the whole parameter's shape.
    """

    def __init__(
        self,
        shards: Mapping[str, torch.Tensor],
        whole: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
        endpoint: Endpoint,
        owners: Owners,
    ):
        super().__init__(shards, dtypes, endpoint, 1)
        self._items = {n: item_of(n, whole[n], owners, dtypes[n]) for n in self.slots}

    def departures(self, stage: StageProgram, late: Mapping[str, bool]) -> Departures:
        return stream_departures(stage, self._items, self._dp)

    def _settle(self, item: Item, total: torch.Tensor) -> None:
        slot = self.slots[item.name]
        rows = item.own_rows(slot.tensor, self._dp, self._replica)
        add_mean_(rows, total.view(rows.shape), self._dp, slot.fresh)
        # the pieces of a gradient come in order
        slot.fresh = slot.fresh and item.piece < item.pieces - 1


class SharedGradients(WholeGradients):
    """zero=2 and 3 in one process: the first replica has the slots, all meet after a backward.

    Args:
        leader: the first replica's; None for itself.
    """

    def __init__(
        self,
        params: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
        endpoint: Endpoint,
        leader: SharedGradients | None,
    ):
        super().__init__(params if leader is None else {}, dtypes, endpoint, 1)
        self.leads = leader is None
        if leader is not None:
            self.slots = leader.slots
        self.inlets = {name: Inlet(self, name) for name in self.slots}
        self._made: list[tuple[str, torch.Tensor]] = []

    def take(self, name: str, grad: torch.Tensor) -> None:
        self._made.append((name, grad))

    def collect(self) -> Run:
        end = self._endpoint
        assert isinstance(end.transport, Loopback)
        made, self._made = self._made, []
        meeting = end.transport.meet(end.peers, end.rank, made, self._add)
        while not meeting.ready():
            yield
        meeting.wait()

    def reduce(self, departures: Departures, last: bool) -> Run:
        yield from ()

    def abandon(self) -> None:
        self._made.clear()

    def _add(self, brought: list[list[tuple[str, torch.Tensor]]]) -> None:
        for grads in zip(*brought, strict=True):
            slot = self.slots[grads[0][0]]
            first = torch.empty_like(slot.tensor).copy_(grads[0][1])
            total = ordered_sum_(first, [grad for _, grad in grads[1:]])
            add_mean_(slot.tensor, total, len(brought), slot.fresh)
            slot.fresh = False

"""Where the gradients of one rank add up, and how replicas exchange them.

=================  ===========================================================================
`WholeGradients`   all rows on every replica; one mean per step. zero=0, and zero=1 where ranks
                   share a process, or gradients are compressed
`SentGradients`    whole ones leave with the last microbatch, each to the owner of its rows; of the
                   others a replica has its own rows, and what a backward makes leaves at once
`SharedGradients`  the same sums where the replicas of a stage share a process
=================  ===========================================================================

Every sum over replicas is taken in rank order, so processes and ranks of one process agree bit
for bit. Of a gradient that is not whole the replicas' mean is added up per microbatch, not taken of
the sums. `Zero.whole_grad` says which are whole: all at level 1, at 2 and 3 those that are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ...compiler.compression.methods import Method
from ...compiler.ir.actions import Kind
from ...compiler.ir.ops import Slot
from ...compiler.ir.precision import REDUCED
from ...compiler.ir.program import StageProgram
from ...compiler.ir.shards import (
    Departures,
    Entry,
    Item,
    Owners,
    departures_of,
    item_of,
    rows_of,
)
from ...compiler.ir.zero import Zero
from ..compression.compressed import DTYPE, Compressed
from ..compression.touched import TouchedRows
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
        touched: the exchange of tables of which rows travel, where there are some.
    """

    leads, closes = True, False

    def __init__(
        self,
        params: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
        endpoint: Endpoint,
        parts: int,
        compress: Method | None = None,
        tables: Collection[str] = (),
    ):
        chosen = {n: p for n, p in params.items() if n in tables and endpoint.dp > 1}
        rest = {name: param for name, param in params.items() if name not in chosen}
        super().__init__(rest, dtypes, endpoint.device, parts)
        self._endpoint = endpoint
        self.compressed: Compressed | None = None
        if compress is not None and endpoint.dp > 1:
            self.compressed = Compressed(compress, dict(self.views), endpoint)
        self.touched: TouchedRows | None = None
        if chosen:
            apart = {n: Bucket({n: p}, dtypes, endpoint.device, parts) for n, p in chosen.items()}
            self.touched = TouchedRows(apart, endpoint)
            views = self.views | self.touched.views
            self.views = {name: views[name] for name in params}
        self.slots = {name: GradSlot(view) for name, view in self.views.items()}
        self.inlets: Mapping[str, GradSlot | Inlet] = self.slots

    def divide(self, owners: Owners, names: Collection[str]) -> None:
        """The optimizer reads this replica's rows alone."""
        end = self._endpoint
        for name in names:
            slot = self.slots[name]
            slot.owned = rows_of(slot.tensor, end.dp, end.replica, owners.get(name))

    def departures(self, stage: StageProgram, late: Mapping[str, bool]) -> Departures:
        """What leaves when, while a stage program runs.

        Args:
            late: `compiler.ir.shards.late_gradients`.
        """
        return Departures()

    def begin(self, departures: Departures, part: Kind, last: bool) -> None:
        """Before a backward program; ``last``: of the last microbatch."""

    def leave(self, grad: torch.Tensor) -> None:
        """A gradient that is complete, or the sum that it has been added to, goes to its owners."""

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
        if self.touched is not None and last:
            yield from self.touched.mean_()
        for dtype, buffer in self.buffers.items() if last else ():
            if compressed is not None and dtype is DTYPE:
                continue
            pending = self._endpoint.mean(buffer)
            while not pending.ready():
                yield
            pending.wait()

    def summed(self, name: str) -> torch.Tensor:
        """What stages that share a parameter add up, of its gradient."""
        return self.slots[name].tensor

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
        apart = [] if self.touched is None else self.touched.buffers
        return [*self.buffers.values(), *apart]


class Inlet(Slot):
    """Takes the gradients of one parameter on behalf of a bucket that exchanges them."""

    def __init__(self, bucket: SentGradients | SharedGradients, name: str):
        self._bucket, self._name = bucket, name

    @property
    def sums(self) -> torch.Tensor | None:
        slot = self._bucket.slots[self._name]
        return slot.tensor if slot.closes else None

    def add(self, grad: torch.Tensor) -> None:
        self._bucket.take(self._name, grad)

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        if (slot := self._bucket.slots[self._name]).closes:
            slot.add_product(left, right)
            self._bucket.leave(slot.tensor)
        else:
            super().add_product(left, right)

    def add_rows(
        self, grad: torch.Tensor, ids: torch.Tensor, rows: int, padding: int, by_count: bool
    ) -> None:
        if (slot := self._bucket.slots[self._name]).closes:
            slot.add_rows(grad, ids, rows, padding, by_count)
            self._bucket.leave(slot.tensor)
        else:
            super().add_rows(grad, ids, rows, padding, by_count)


class SentGradients(WholeGradients):
    """What leaves in parcels, between processes, while a backward runs.

    Args:
        shards: FQN -> this rank's rows of the parameter.
        like: FQN -> a tensor of the whole parameter's shape.
        whole: the parameters whose gradients add up whole.
    """

    def __init__(
        self,
        shards: Mapping[str, torch.Tensor],
        like: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
        endpoint: Endpoint,
        owners: Owners,
        zero: Zero,
        whole: Collection[str],
    ):
        chosen = {name: like[name] if name in whole else rows for name, rows in shards.items()}
        super().__init__(chosen, dtypes, endpoint, 1 if zero.streams else endpoint.dp)
        transport = endpoint.transport
        assert isinstance(transport, Processes)
        self._dp, self._replica, self._zero = endpoint.dp, endpoint.replica, zero
        self.closes = zero.closes
        self._items = {n: item_of(n, like[n], owners, dtypes[n]) for n in self.slots}
        self.divide(owners, whole)
        for name in whole:
            self.slots[name].closes = True
        self.inlets = {name: Inlet(self, name) for name in self.slots}
        self._outgoing = Outgoing(transport, self._settle, self._rows)
        self._leaving: list[tuple[Entry, ...]] = []

    def departures(self, stage: StageProgram, late: Mapping[str, bool]) -> Departures:
        return departures_of(stage, self._items, self._dp, self._zero, late)

    def begin(self, departures: Departures, part: Kind, last: bool) -> None:
        self._leaving = list(departures.leaving(part, last))[::-1]

    def take(self, name: str, grad: torch.Tensor) -> None:
        slot = self.slots[name]
        if slot.closes:
            slot.add(grad)
            grad = slot.tensor
        self.leave(grad)

    def leave(self, grad: torch.Tensor) -> None:
        if self._leaving:
            self._outgoing.put(self._leaving.pop(), grad)

    def reduce(self, departures: Departures, last: bool) -> Run:
        for name, entries in departures.closing.items():
            self._outgoing.put(entries, self.slots[name].tensor)
        self._outgoing.drain()
        yield from ()

    def summed(self, name: str) -> torch.Tensor:
        """At level 1 stages add up whole gradients, above a replica its rows."""
        slot = self.slots[name]
        return slot.owned if self._zero.streams else slot.tensor

    def _rows(self, item: Item) -> torch.Tensor:
        """This replica's, of a gradient that is whole."""
        return item.rows(self.slots[item.name].tensor, self._dp, self._replica)

    def _settle(self, item: Item, total: torch.Tensor) -> None:
        """Take the sum over the replicas of this rank's rows."""
        slot = self.slots[item.name]
        if slot.closes:
            rows = self._rows(item)
            add_mean_(rows, total.view(rows.shape), self._dp, fresh=True)
            return
        rows = item.own_rows(slot.tensor, self._dp, self._replica)
        add_mean_(rows, total.view(rows.shape), self._dp, slot.fresh)
        # the pieces of a gradient come in order
        slot.fresh = slot.fresh and item.piece < item.pieces - 1

    def _owned(self) -> list[torch.Tensor]:
        if not any(slot.closes for slot in self.slots.values()):
            return super()._owned()
        return [slot.owned for slot in self.slots.values()]


class SharedGradients(WholeGradients):
    """zero=2 and 3 in one process: the first replica has the slots, all meet after a backward.

    Args:
        leader: the first replica's; None for itself.
        whole: the parameters whose gradients add up whole, on each replica.
    """

    def __init__(
        self,
        params: Mapping[str, torch.Tensor],
        dtypes: Mapping[str, torch.dtype],
        endpoint: Endpoint,
        leader: SharedGradients | None,
        whole: Collection[str],
    ):
        shared = {name: param for name, param in params.items() if name not in whole}
        super().__init__(shared if leader is None else {}, dtypes, endpoint, 1)
        self.leads = leader is None
        if leader is not None:
            self.slots = {name: leader.slots[name] for name in shared}
        kept = {name: param for name, param in params.items() if name in whole}
        self._whole = WholeGradients(kept, dtypes, endpoint, endpoint.dp)
        self.inlets = {name: Inlet(self, name) for name in self.slots} | dict(self._whole.inlets)
        self.slots |= self._whole.slots
        for name in kept:
            self.slots[name].closes = True
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
        yield from self._whole.reduce(departures, last)

    def abandon(self) -> None:
        self._made.clear()

    def _owned(self) -> list[torch.Tensor]:
        return [*self.buffers.values(), *self._whole.buffers.values()]

    def _add(self, brought: list[list[tuple[str, torch.Tensor]]]) -> None:
        for grads in zip(*brought, strict=True):
            slot = self.slots[grads[0][0]]
            first = torch.empty_like(slot.tensor).copy_(grads[0][1])
            total = ordered_sum_(first, [grad for _, grad in grads[1:]])
            add_mean_(slot.tensor, total, len(brought), slot.fresh)
            slot.fresh = False

"""What the replicas of a rank's stages exchange: over torch.distributed, or memory that all see.

All of them make the same calls in the same order. Sums are taken in rank order, so that both ways
give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from ...compiler.ir.program import ValueSpec
from ...compiler.memory import rank_memory
from .doing import HERE
from .shared_memory import SharedMemory
from .transport import Pending, Values, ordered_mean

# torch 2.13 renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

CHANNEL = -2  # of what goes through memory; those of messages between stages are not negative


class Replicas(Protocol):
    """The exchange between them.

    Attributes:
        sent_bytes: what this replica has given the others, but for what went through memory, which
            `SharedMemory` counts.
    """

    sent_bytes: int

    def mean_(self, bucket: torch.Tensor) -> None:
        """Replace a bucket, of a multiple of their number of elements, by the mean over all."""
        ...

    def scatter(self, blocks: torch.Tensor, sizes: Sequence[int]) -> Pending:
        """Give every other replica r its block, of ``sizes[r]`` elements.

        Brings what each of the others gave this one.
        """
        ...

    def gather(self, mine: torch.Tensor) -> Pending:
        """Brings what each replica gives, all of one size, this one's included."""
        ...

    def gather_into(self, mine: torch.Tensor, room: torch.Tensor) -> Pending:
        """Writes what each replica gives, one after the other."""
        ...

    def share(self, room: torch.Tensor, blocks: Sequence[torch.Tensor]) -> Pending:
        """Each replica gives all others its block of ``room``, of any size; brings the blocks."""
        ...


def pieces(bucket: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
    """Parts of a bucket that are exchanged one after the other, for ``count`` replicas."""
    segment = rank_memory.SEGMENT_BYTES // bucket.element_size() // count * count
    return torch.split(bucket, segment)


class _Exchange:
    """Collectives under way; what goes out must stay as it is until they are waited for."""

    def __init__(
        self,
        works: Sequence[dist.Work | None],
        sent: torch.Tensor,
        brought: Values,
        ranks: Sequence[int],
    ):
        self.works, self.sent, self.brought = [w for w in works if w is not None], sent, brought
        self.ranks = ranks

    def ready(self) -> bool:
        return True

    def wait(self) -> Values:
        with HERE.waiting(self.ranks):
            for work in self.works:
                work.wait()
        return self.brought


class DistributedReplicas:
    """Over torch.distributed.

    Args:
        group: of the replicas.
        me: which of them this process is in, of ``count``.
        ranks: of the replicas.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, me: int, count: int, ranks: Sequence[int] = ()
    ):
        self._group, self._me, self._count = group, me, count
        self._others = tuple(rank for i, rank in enumerate(ranks) if i != me)
        self.sent_bytes = 0

    def mean_(self, bucket: torch.Tensor) -> None:
        self.sent_bytes += 2 * bucket.nbytes * (self._count - 1) // self._count
        for piece in pieces(bucket, self._count):
            exchanged = torch.empty_like(piece)  # (elements,): this rank's share, `count` times
            with HERE.waiting(self._others):
                dist.all_to_all_single(exchanged, piece, group=self._group)
                mine = ordered_mean(exchanged.chunk(self._count))
                _all_gather(piece, mine, group=self._group)

    def scatter(self, blocks: torch.Tensor, sizes: Sequence[int]) -> Pending:
        me, others = self._me, self._count - 1
        sent = [0 if r == me else size for r, size in enumerate(sizes)]
        received = [0 if r == me else sizes[me] for r in range(len(sizes))]
        room = blocks.new_empty(sizes[me] * others)
        self.sent_bytes += blocks.nbytes
        work = dist.all_to_all_single(
            room, blocks, received, sent, group=self._group, async_op=True
        )
        return _Exchange([work], blocks, list(room.view(others, sizes[me])), self._others)

    def gather(self, mine: torch.Tensor) -> Pending:
        room = mine.new_empty(self._count, mine.numel())
        self.sent_bytes += mine.nbytes * (self._count - 1)
        work = _all_gather(room.view(-1), mine, group=self._group, async_op=True)
        return _Exchange([work], mine, list(room), self._others)

    def gather_into(self, mine: torch.Tensor, room: torch.Tensor) -> Pending:
        work = _all_gather(room, mine, group=self._group, async_op=True)
        self.sent_bytes += mine.nbytes * (self._count - 1)
        return _Exchange([work], mine, [], self._others)

    def share(self, room: torch.Tensor, blocks: Sequence[torch.Tensor]) -> Pending:
        self.sent_bytes += blocks[self._me].nbytes * (self._count - 1)
        works = [
            dist.broadcast(block, group=self._group, group_src=replica, async_op=True)
            for replica, block in enumerate(blocks)
            if block.numel()
        ]
        return _Exchange(works, room, list(blocks), self._others)


class _Later:
    """What is done when it is waited for."""

    def __init__(self, finish: Callable[[], Values]):
        self.wait = finish

    def ready(self) -> bool:
        return True


class SharedReplicas:
    """Through memory, where all of them are processes of one machine.

    Args:
        ranks: of the replicas, this one's among them.
    """

    def __init__(self, shared: SharedMemory, ranks: Sequence[int], rank: int):
        self._shared, self._ranks, self._me = shared, ranks, ranks.index(rank)
        self.sent_bytes = 0

    def mean_(self, bucket: torch.Tensor) -> None:
        for piece in pieces(bucket, len(self._ranks)):
            shares = piece.chunk(len(self._ranks))
            parts = self._scatter(shares).wait()
            parts.insert(self._me, shares[self._me])
            mine = ordered_mean(parts)
            del parts
            for share, given in zip(shares, self.gather(mine).wait(), strict=True):
                share.copy_(given)

    def scatter(self, blocks: torch.Tensor, sizes: Sequence[int]) -> Pending:
        cut = [0 if r == self._me else size for r, size in enumerate(sizes)]
        given = list(torch.split(blocks, cut))
        given[self._me] = blocks.new_empty(sizes[self._me])
        return self._scatter(given)

    def _scatter(self, blocks: Sequence[torch.Tensor]) -> Pending:
        """The block in this replica's own place tells the size of what it is given."""
        for replica in self._others():
            self._send(replica, blocks[replica])
        mine = blocks[self._me]
        coming = [self._ask(replica, mine) for replica in self._others()]
        return _Later(lambda: [each() for each in coming])

    def gather(self, mine: torch.Tensor) -> Pending:
        return self._exchange(mine, [mine] * len(self._ranks))

    def gather_into(self, mine: torch.Tensor, room: torch.Tensor) -> Pending:
        pending, parts = self.gather(mine), room.chunk(len(self._ranks))

        def write() -> Values:
            for part, given in zip(parts, pending.wait(), strict=True):
                part.copy_(given)
            return []

        return _Later(write)

    def share(self, room: torch.Tensor, blocks: Sequence[torch.Tensor]) -> Pending:
        return self._exchange(blocks[self._me], blocks)

    def _exchange(self, mine: torch.Tensor, like: Sequence[torch.Tensor]) -> Pending:
        """Give all others this, and bring theirs, which are like these; in rank order."""
        for replica in self._others():
            self._send(replica, mine)
        coming: list[Callable[[], torch.Tensor]] = [
            (lambda: mine) if replica == self._me else self._ask(replica, like[replica])
            for replica in range(len(self._ranks))
        ]
        return _Later(lambda: [each() for each in coming])

    def _others(self) -> list[int]:
        return [replica for replica in range(len(self._ranks)) if replica != self._me]

    def _send(self, replica: int, block: torch.Tensor) -> None:
        if block.numel():
            self._shared.send(self._ranks[replica], CHANNEL, [block], [_flat(block)])

    def _ask(self, replica: int, like: torch.Tensor) -> Callable[[], torch.Tensor]:
        """For a block of another replica, of as many elements as this one."""
        if not like.numel():
            return lambda: like
        mail = self._shared.receive(self._ranks[replica], CHANNEL, [_flat(like)])
        return lambda: mail.wait()[0]


def _flat(block: torch.Tensor) -> ValueSpec:
    return ValueSpec("block", (block.numel(),), (1,), block.dtype)

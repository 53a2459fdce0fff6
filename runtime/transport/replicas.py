"""What the replicas of a rank's stages exchange: over torch.distributed, or memory that all see.

All of them make the same calls in the same order. Sums are taken in rank order, so that both ways
give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from ...compiler.ir.program import ValueSpec
from ...compiler.memory import rank_memory
from .doing import HERE
from .shared_memory import Draft, SharedMemory
from .transport import Pending, Values, ordered_mean

# torch 2.13 renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Write = Callable[[torch.Tensor], None]
"""Writes a block, (elements,)."""

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

    def room(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Room:
        """Blocks to write what every other replica r is given, of ``sizes[r]`` elements."""
        ...

    def scatter(self, room: Room) -> Pending:
        """Give every other replica its block. Brings what each of the others gave this one."""
        ...

    def publish(
        self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device, write: Write
    ) -> Pending:
        """Each replica r gives all others ``sizes[r]`` elements, which ``write`` writes. Brings
        those of all; in the place of this one's, nothing that could be relied on."""
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


class Room:
    """What the other replicas are to be given.

    Attributes:
        sizes: of all replicas' blocks; of this replica's own, what each of the others gives it.
        blocks: per replica (elements,); of this one empty.
        whole: all of them as one tensor, or nothing.
        drafts: of the others, where they are in memory that these see.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        blocks: Sequence[torch.Tensor],
        whole: torch.Tensor | None = None,
        drafts: Mapping[int, Draft] | None = None,
    ):
        self.sizes, self.blocks = sizes, blocks
        self.whole, self.drafts = whole, drafts or {}


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

    def room(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Room:
        sent = [0 if r == self._me else size for r, size in enumerate(sizes)]
        whole = torch.empty(sum(sent), dtype=dtype, device=device)
        return Room(sizes, torch.split(whole, sent), whole)

    def scatter(self, room: Room) -> Pending:
        me, others, blocks = self._me, self._count - 1, room.whole
        assert blocks is not None
        sent = [block.numel() for block in room.blocks]
        received = [0 if r == me else room.sizes[me] for r in range(self._count)]
        coming = blocks.new_empty(room.sizes[me] * others)
        self.sent_bytes += blocks.nbytes
        work = dist.all_to_all_single(
            coming, blocks, received, sent, group=self._group, async_op=True
        )
        return _Exchange([work], blocks, list(coming.view(others, room.sizes[me])), self._others)

    def publish(
        self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device, write: Write
    ) -> Pending:
        if len(set(sizes)) == 1:
            mine = torch.empty(sizes[0], dtype=dtype, device=device)
            write(mine)
            return self.gather(mine)
        room = torch.empty(sum(sizes), dtype=dtype, device=device)
        blocks = torch.split(room, list(sizes))
        write(blocks[self._me])
        return self.share(room, blocks)

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
            room = self.room([share.numel() for share in shares], piece.dtype, piece.device)
            for replica in self._others():
                room.blocks[replica].copy_(shares[replica])
            parts = self.scatter(room).wait()
            parts.insert(self._me, shares[self._me])
            mine = ordered_mean(parts)
            del parts
            for share, given in zip(shares, self.gather(mine).wait(), strict=True):
                share.copy_(given)

    def room(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Room:
        drafts = {r: self._draft(r, sizes[r], dtype) for r in self._others() if sizes[r]}
        none = torch.empty(0, dtype=dtype, device=device)
        blocks = [drafts[r].values[0] if r in drafts else none for r in range(len(sizes))]
        return Room(sizes, blocks, drafts=drafts)

    def scatter(self, room: Room) -> Pending:
        for draft in room.drafts.values():
            self._shared.post(draft, CHANNEL)
        size, dtype = room.sizes[self._me], room.blocks[self._me].dtype
        coming = [self._ask(replica, size, dtype) for replica in self._others()]
        return _Later(lambda: [each() for each in coming])

    def publish(
        self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device, write: Write
    ) -> Pending:
        for replica in self._others() if sizes[self._me] else ():
            draft = self._draft(replica, sizes[self._me], dtype)
            write(draft.values[0])
            self._shared.post(draft, CHANNEL)
        mine = torch.empty(0, dtype=dtype)
        coming: list[Callable[[], torch.Tensor]] = [
            (lambda: mine) if replica == self._me else self._ask(replica, size, dtype)
            for replica, size in enumerate(sizes)
        ]
        return _Later(lambda: [each() for each in coming])

    def _draft(self, replica: int, elements: int, dtype: torch.dtype) -> Draft:
        return self._shared.draft(self._ranks[replica], _flat(elements, dtype))

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
            (lambda: mine)
            if replica == self._me
            else self._ask(replica, like[replica].numel(), mine.dtype)
            for replica in range(len(self._ranks))
        ]
        return _Later(lambda: [each() for each in coming])

    def _others(self) -> list[int]:
        return [replica for replica in range(len(self._ranks)) if replica != self._me]

    def _send(self, replica: int, block: torch.Tensor) -> None:
        if block.numel():
            specs = _flat(block.numel(), block.dtype)
            self._shared.send(self._ranks[replica], CHANNEL, [block], specs)

    def _ask(self, replica: int, elements: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        """For a block of another replica."""
        if not elements:
            return lambda: torch.empty(0, dtype=dtype)
        specs = _flat(elements, dtype)
        mail = self._shared.receive(self._ranks[replica], CHANNEL, specs)
        return lambda: mail.wait()[0]


@functools.lru_cache(maxsize=4096)
def _flat(elements: int, dtype: torch.dtype) -> tuple[ValueSpec]:
    return (ValueSpec("block", (elements,), (1,), dtype),)

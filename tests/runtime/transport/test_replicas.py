"""What replicas of one machine give each other: written where the others read it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from pipecompile.compiler.ir.shards import Item, Parcel
from pipecompile.runtime.transport.replicas import SharedReplicas
from pipecompile.runtime.transport.shared_memory import IN_PACKET, SharedMemory
from support.connected import of

CPU = torch.device("cpu")
LARGE = IN_PACKET  # floats: four times what fits into a packet


def replicas(count: int) -> list[SharedReplicas]:
    return [
        SharedReplicas(SharedMemory(each), range(count), rank)
        for rank, each in enumerate(of(count))
    ]


def number(giver: int, taker: int) -> float:
    return 10.0 * giver + taker


@pytest.mark.parametrize("sizes", [(4, 4, 4), (LARGE, 5, 0), (0, LARGE, LARGE + 1)])
def test_every_replica_gets_its_blocks_of_the_others(sizes: Sequence[int]) -> None:
    three = replicas(3)
    pending = []
    for rank, each in enumerate(three):
        room = each.room(sizes, torch.float32, CPU)
        assert [b.numel() for b in room.blocks] == [n * (r != rank) for r, n in enumerate(sizes)]
        for other, block in enumerate(room.blocks):
            block.fill_(number(rank, other))
        pending.append(each.scatter(room))
    for rank, brought in enumerate(pending):
        givers = [giver for giver in range(3) if giver != rank]
        for giver, block in zip(givers, brought.wait(), strict=True):
            assert torch.equal(block, torch.full((sizes[rank],), number(giver, rank)))


@pytest.mark.parametrize("sizes", [(4, 4, 4), (LARGE, 5, 0)])
def test_what_is_published_is_written_once_for_each_other_replica(sizes: Sequence[int]) -> None:
    written: list[int] = []

    def write(block: torch.Tensor, rank: int) -> None:
        written.append(rank)
        block.fill_(rank)

    three = replicas(3)
    pending = [
        each.publish(sizes, torch.bfloat16, CPU, lambda block, rank=rank: write(block, rank))
        for rank, each in enumerate(three)
    ]
    assert written == [rank for rank, size in enumerate(sizes) for _ in range(2) if size]
    for rank, brought in enumerate(pending):
        for giver, block in enumerate(brought.wait()):
            if giver != rank:
                assert torch.equal(block, torch.full((sizes[giver],), giver, dtype=torch.bfloat16))


def test_blocks_that_are_written_are_no_others_until_they_are_gone() -> None:
    """Two rooms that are filled at once, of one replica."""
    here, there = replicas(2)
    rooms = [here.room((0, LARGE), torch.float32, CPU) for _ in range(2)]
    for i, room in enumerate(rooms):
        room.blocks[1].fill_(i + 1)
    for room in rooms:
        here.scatter(room)
    brought = [there.scatter(there.room((0, LARGE), torch.float32, CPU)).wait() for _ in rooms]
    assert [float(blocks[0][-1]) for blocks in brought] == [1.0, 2.0]


def test_rows_that_stay_are_not_packed() -> None:
    items = tuple(Item(str(i), (rows, 4), torch.float32) for i, rows in enumerate((6, 3)))
    packed, stay = Parcel(items, 2), Parcel(items, 2, stays=True)
    sent, received = packed.scatter_bytes  # 5 rows and 4
    assert (sent, received) == (9 * 16, 5 * 16)
    assert stay.scatter_bytes == (sent - 4 * 16, received)

"""What compressors ask of the other replicas, and how it gets there.

A compressor is a generator: it yields what it wants exchanged, and is sent what came of it. So it
knows neither processes nor ranks that share one, and both have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..transport.processes import Processes
from ..transport.transport import Endpoint, Loopback, Pending, Run, Values

Rounds = Generator["Request", Values, None]


class Request(Protocol):
    """Something that all replicas of a rank's stages do together."""

    def start(self, endpoint: Endpoint) -> Pending:
        """What it brings, one tensor of each replica, in their order."""
        ...

    def sent_bytes(self, endpoint: Endpoint) -> int:
        """What this replica gives the others, if they are other processes."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Scatter(Request):
    """Replica r gets the r-th block of each. Blocks for one replica are of one size everywhere.

    Attributes:
        blocks: per replica (elements,), all of one dtype.
    """

    blocks: Sequence[torch.Tensor]

    def start(self, endpoint: Endpoint) -> Pending:
        me, transport = endpoint.replica, endpoint.transport
        if isinstance(transport, Loopback):
            return _met(transport, endpoint, self.blocks, lambda all_, r: [b[r] for b in all_])
        assert isinstance(transport, Processes)
        mine, sizes = self.blocks[me], [block.numel() for block in self.blocks]
        room = transport.replicas.room(sizes, mine.dtype, mine.device)
        for r, block in enumerate(self.blocks):
            if r != me:
                room.blocks[r].copy_(block)
        return _Beside(transport.replicas.scatter(room), me, mine)

    def sent_bytes(self, endpoint: Endpoint) -> int:
        return sum(b.nbytes for r, b in enumerate(self.blocks) if r != endpoint.replica)


@dataclass(frozen=True, eq=False)
class Share(Request):
    """All get what each gives.

    Attributes:
        mine: (elements,).
        sizes: elements of each replica's.
    """

    mine: torch.Tensor
    sizes: Sequence[int]

    def start(self, endpoint: Endpoint) -> Pending:
        transport = endpoint.transport
        if isinstance(transport, Loopback):
            return _met(transport, endpoint, self.mine, lambda all_, _: list(all_))
        assert isinstance(transport, Processes)
        room = self.mine.new_empty(sum(self.sizes))
        blocks = torch.split(room, list(self.sizes))
        blocks[endpoint.replica].copy_(self.mine)
        return transport.replicas.share(room, blocks)

    def sent_bytes(self, endpoint: Endpoint) -> int:
        return self.mine.nbytes * (endpoint.dp - 1)


@dataclass(frozen=True, eq=False)
class Mean(Request):
    """The mean over all is written over each; it brings nothing.

    Attributes:
        bucket: (elements,), a multiple of the number of replicas.
    """

    bucket: torch.Tensor

    def start(self, endpoint: Endpoint) -> Pending:
        return endpoint.mean(self.bucket)

    def sent_bytes(self, endpoint: Endpoint) -> int:
        return 2 * self.bucket.nbytes * (endpoint.dp - 1) // endpoint.dp


def carry(rounds: Rounds, endpoint: Endpoint, tell: Callable[[int], None]) -> Run:
    """Do what a compressor asks for, until it asks for no more.

    Args:
        tell: is told the bytes that each request sends.
    """
    brought: Values | None = None
    while True:
        try:
            request = next(rounds) if brought is None else rounds.send(brought)
        except StopIteration:
            return
        tell(request.sent_bytes(endpoint))
        pending = request.start(endpoint)
        while not pending.ready():
            yield
        brought = pending.wait()


@dataclass(frozen=True)
class _Beside:
    """What the others give, and this replica's own in its place."""

    others: Pending
    replica: int
    own: torch.Tensor

    def ready(self) -> bool:
        return self.others.ready()

    def wait(self) -> Values:
        brought = list(self.others.wait())
        brought.insert(self.replica, self.own)
        return brought


@dataclass(frozen=True)
class _Met:
    """Ranks of one process that have brought something."""

    meeting: Pending
    box: Values

    def ready(self) -> bool:
        return self.meeting.ready()

    def wait(self) -> Values:
        return self.box


def _met(transport: Loopback, endpoint: Endpoint, given: Any, chosen: Any) -> Pending:
    """
    Args:
        chosen: (what all have brought, a replica) -> what that gets of it.
    """
    box: Values = []

    def act(brought: list[tuple[Any, Values]]) -> None:
        for replica, (_, theirs) in enumerate(brought):
            theirs += chosen([each for each, _ in brought], replica)

    return _Met(transport.meet(endpoint.peers, endpoint.rank, (given, box), act), box)

"""How ranks reach each other: through memory in one process, or between processes
(`processes.py`).

Both give the same numbers bit for bit: values keep their strides, and sums over replicas are
taken in rank order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from ...compiler.ir.errors import VerificationError
from ...compiler.ir.program import ValueSpec
from . import wire
from .mesh import Mesh

Values = list[torch.Tensor]

Run = Generator[None, None, None]
"""Work of one rank, which yields while another rank of its process has to run first."""


class Pending(Protocol):
    """Something that arrives later."""

    def ready(self) -> bool:
        """Whether `wait` would return without another rank of this process having to run."""
        ...

    def wait(self) -> Values: ...


class Transport(Protocol):
    """Point-to-point and collective exchange between ranks.

    Messages of one channel, from one rank to another, arrive in the order in which they were sent;
    what the channels of two ranks carry in one direction is sent and received in the same order.
    """

    @property
    def sent_bytes(self) -> int:
        """Of values and gradients that have left this process so far."""
        ...

    def open(self, routes: Iterable[tuple[int, int]]) -> None:
        """Prepare for messages between these stages (from, to); the same call on every rank."""
        ...

    def send(
        self, src: int, dst: int, values: Values, specs: Sequence[ValueSpec], channel: int = 0
    ) -> None: ...

    def receive(
        self,
        src: int,
        dst: int,
        specs: Sequence[ValueSpec],
        device: torch.device,
        channel: int = 0,
    ) -> Pending: ...

    def mean(self, rank: int, ranks: Sequence[int], bucket: torch.Tensor) -> Pending:
        """Replace every bucket by the mean over the ranks, added in rank order."""
        ...

    def check(self) -> None:
        """Raises PeerFailedError where a run has failed, and ranks may be at different steps."""
        ...

    def flush(self) -> None:
        """Wait until everything sent has left."""
        ...

    def abandon(self) -> None:
        """Forget what a run that failed has sent."""
        ...

    def progress(self) -> int:
        """How often one rank has done something for another."""
        ...


@dataclass(frozen=True)
class Endpoint:
    """Where a rank is: its device, and its end of the transport."""

    rank: int
    mesh: Mesh
    device: torch.device
    transport: Transport

    @cached_property
    def replica(self) -> int:
        return self.mesh.replica_of(self.rank)

    @property
    def dp(self) -> int:
        return self.mesh.dp

    @property
    def stages(self) -> tuple[int, ...]:
        """Those that the rank holds."""
        return self.mesh.stages_of(self.rank)

    @property
    def peers(self) -> tuple[int, ...]:
        """The ranks of the same stages, one per replica, this one among them."""
        return self.mesh.peers_of(self.rank)

    def rank_of(self, stage: int) -> int:
        """The rank of this replica that holds a stage."""
        return self.mesh.rank_of(self.replica, stage)

    def send(self, src: int, dst: int, values: Values, specs: Sequence[ValueSpec]) -> None:
        """From a stage of this rank to another rank's."""
        channel = self.mesh.channel(src, dst)
        self.transport.send(self.rank, self.rank_of(dst), values, specs, channel)

    def receive(self, src: int, dst: int, specs: Sequence[ValueSpec]) -> Pending:
        """From another rank's stage to one of this rank."""
        channel = self.mesh.channel(src, dst)
        return self.transport.receive(self.rank_of(src), self.rank, specs, self.device, channel)

    def mean(self, bucket: torch.Tensor) -> Pending:
        """Replace it by the mean over the peers' buckets."""
        return self.transport.mean(self.rank, self.peers, bucket)


def ordered_mean(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """((p0 + p1) + p2 + ...) / n: one order, whoever computes it."""
    return ordered_mean_(parts[0].clone(), parts[1:])


def ordered_mean_(first: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same, in the first one's memory and dtype."""
    return ordered_sum_(first, others).div_(1 + len(others))


def ordered_sum_(first: torch.Tensor, others: Iterable[torch.Tensor]) -> torch.Tensor:
    for part in others:
        first += part.to(first)
    return first


def add_mean_(total: torch.Tensor, parts: torch.Tensor, count: int, fresh: bool) -> None:
    """Add the mean to a total, given the sum of its parts, which is overwritten.

    Args:
        fresh: there is no total yet.
    """
    if fresh:
        torch.div(parts, count, out=total)
    elif count & (count - 1):
        total += parts.div_(count)
    else:  # a power of two divides exactly, so that both are done in one pass
        total.add_(parts, alpha=1 / count)


class _Mail:
    """A message that another rank of this process has sent, or will."""

    def __init__(self, device: torch.device):
        self.device = device
        self.values: Values | None = None

    def ready(self) -> bool:
        return self.values is not None

    def wait(self) -> Values:
        assert self.values is not None, "wait until it is ready"
        values, self.values = self.values, None
        return [value.to(self.device) for value in values]


class _Meeting:
    """Ranks of this process that do something together, when every one has brought its part."""

    def __init__(self, ranks: Sequence[int]):
        self.ranks = tuple(ranks)
        self.brought: dict[int, Any] = {}

    def bring(self, rank: int, brought: Any, act: Callable[[list[Any]], None]) -> None:
        self.brought[rank] = brought
        if self.ready():
            act([self.brought[rank] for rank in self.ranks])
            self.brought = dict.fromkeys(self.ranks)

    def ready(self) -> bool:
        return len(self.brought) == len(self.ranks)

    def wait(self) -> Values:
        return []


def _average(buckets: list[torch.Tensor]) -> None:
    mean = ordered_mean(buckets)
    for bucket in buckets:
        bucket.copy_(mean)


class Loopback:
    """All ranks in one process: a message is handed over, a collective computed once.

    The receive that is posted first gets what is sent first, whichever is waited for first.
    """

    def __init__(self) -> None:
        self.queues: dict[tuple[int, int, int], deque[Values]] = defaultdict(deque)
        self.posted: dict[tuple[int, int, int], deque[_Mail]] = defaultdict(deque)
        self.meetings: dict[tuple[int, ...], list[_Meeting]] = defaultdict(list)
        self.events = 0
        self.sent_bytes = 0  # nothing leaves the process

    def open(self, routes: Iterable[tuple[int, int]]) -> None:
        """Memory needs no preparation."""

    def check(self) -> None:
        """A run that fails here leaves all as it was."""

    def progress(self) -> int:
        return self.events

    def send(
        self, src: int, dst: int, values: Values, specs: Sequence[ValueSpec], channel: int = 0
    ) -> None:
        conformed = [wire.conform(v, s) for v, s in zip(values, specs, strict=True)]
        if posted := self.posted[src, dst, channel]:
            posted.popleft().values = conformed
        else:
            self.queues[src, dst, channel].append(conformed)
        self.events += 1

    def receive(
        self,
        src: int,
        dst: int,
        specs: Sequence[ValueSpec],
        device: torch.device,
        channel: int = 0,
    ) -> Pending:
        mail = _Mail(device)
        if queue := self.queues[src, dst, channel]:
            mail.values = queue.popleft()
        else:
            self.posted[src, dst, channel].append(mail)
        return mail

    def mean(self, rank: int, ranks: Sequence[int], bucket: torch.Tensor) -> Pending:
        return self.meet(ranks, rank, bucket, _average)

    def meet(
        self,
        ranks: Sequence[int],
        rank: int,
        brought: Any,
        act: Callable[[list[Any]], None],
    ) -> Pending:
        """Once all ranks have brought something, one of them acts on it, in rank order."""
        meetings = self.meetings[tuple(ranks)]
        meeting = next((m for m in meetings if rank not in m.brought), None)
        if meeting is None:
            meeting = _Meeting(ranks)
            meetings.append(meeting)
        meeting.bring(rank, brought, act)
        self.events += 1
        return meeting

    def flush(self) -> None:
        if any(self.queues.values()):
            unread = [f"{src}→{dst}" for (src, dst, _), queue in self.queues.items() if queue]
            raise VerificationError(f"messages that nobody read: {', '.join(unread)}")
        self.meetings.clear()

    def abandon(self) -> None:
        self.queues.clear()
        self.posted.clear()
        self.meetings.clear()

"""How ranks reach each other: through memory in one process, or between processes
(`processes.py`).

Both give the same numbers bit for bit: values keep their strides, and sums over replicas are
taken in rank order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from ...compiler.ir.errors import VerificationError
from ...compiler.ir.program import ValueSpec
from . import wire

Values = list[torch.Tensor]


class Pending(Protocol):
    """Something that arrives later."""

    def ready(self) -> bool:
        """Whether `wait` would return without another rank of this process having to run."""
        ...

    def wait(self) -> Values: ...


class Transport(Protocol):
    """Point-to-point and collective exchange between ranks.

    Messages from one rank to another arrive in the order in which they were sent.
    """

    def open(self, routes: Iterable[tuple[int, int]]) -> None:
        """Prepare for messages between these stages (from, to); the same call on every rank."""
        ...

    def send(self, src: int, dst: int, values: Values, specs: Sequence[ValueSpec]) -> None: ...

    def receive(
        self, src: int, dst: int, specs: Sequence[ValueSpec], device: torch.device
    ) -> Pending: ...

    def mean(self, rank: int, ranks: Sequence[int], bucket: torch.Tensor) -> Pending:
        """Replace every bucket by the mean over the ranks, added in rank order."""
        ...

    def flush(self) -> None:
        """Wait until everything sent has left."""
        ...

    def progress(self) -> int:
        """How often one rank has done something for another."""
        ...


def ordered_mean(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """((p0 + p1) + p2 + ...) / n: one order, whoever computes it."""
    return ordered_mean_(parts[0].clone(), parts[1:])


def ordered_mean_(first: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same, in the first one's memory and dtype."""
    return ordered_sum_(first, others).div_(1 + len(others))


def ordered_sum_(first: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
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

    def __init__(self, queue: deque[Values], device: torch.device):
        self.queue, self.device = queue, device

    def ready(self) -> bool:
        return bool(self.queue)

    def wait(self) -> Values:
        return [value.to(self.device) for value in self.queue.popleft()]


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
    """All ranks in one process: a message is handed over, a collective computed once."""

    def __init__(self) -> None:
        self.queues: dict[tuple[int, int], deque[Values]] = defaultdict(deque)
        self.meetings: dict[tuple[int, ...], list[_Meeting]] = defaultdict(list)
        self.events = 0

    def open(self, routes: Iterable[tuple[int, int]]) -> None:
        """Memory needs no preparation."""

    def progress(self) -> int:
        return self.events

    def send(self, src: int, dst: int, values: Values, specs: Sequence[ValueSpec]) -> None:
        conformed = [wire.conform(v, s) for v, s in zip(values, specs, strict=True)]
        self.queues[src, dst].append(conformed)
        self.events += 1

    def receive(
        self, src: int, dst: int, specs: Sequence[ValueSpec], device: torch.device
    ) -> Pending:
        return _Mail(self.queues[src, dst], device)

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
            unread = [f"{src}→{dst}" for (src, dst), queue in self.queues.items() if queue]
            raise VerificationError(f"messages that nobody read: {', '.join(unread)}")
        self.meetings.clear()

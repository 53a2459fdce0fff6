"""Ranks in processes of their own, over torch.distributed: gloo on CPU, NCCL on CUDA."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ...compiler.costs import memory
from ...compiler.ir.errors import PeerFailedError
from ...compiler.ir.program import ValueSpec
from . import wire
from .mesh import Mesh
from .transport import Pending, Values, ordered_mean

# torch 2.13 renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Arrived:
    """A `Pending` that has its values already."""

    def __init__(self, values: Values):
        self.values = values

    def ready(self) -> bool:
        return True

    def wait(self) -> Values:
        return self.values


class _Receipt:
    """A message under way between processes."""

    def __init__(self, works: list[dist.Work], data: Values, specs: Sequence[ValueSpec]):
        self.works, self.data, self.specs = works, data, specs

    def ready(self) -> bool:
        return True

    def wait(self) -> Values:
        for work in self.works:
            work.wait()
        return [wire.from_bytes(d, s) for d, s in zip(self.data, self.specs, strict=True)]


class _Exchange:
    """Collectives under way; what goes out must stay as it is until they are waited for."""

    def __init__(self, works: Sequence[dist.Work], sent: torch.Tensor, room: torch.Tensor):
        self.works, self.sent, self.room = works, sent, room

    def ready(self) -> bool:
        return True

    def wait(self) -> Values:
        for work in self.works:
            work.wait()
        return [self.room]


class _Outbox:
    """What gloo is sending. Gloo tells that a message has left only to who waits for it.

    So a thread waits, and lets go of the memory; without it a step would keep all that it sent.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        threading.Thread(target=self._wait, name="pipecompile-outbox", daemon=True).start()

    def add(self, work: dist.Work, data: torch.Tensor) -> None:
        self._queue.put([work, data])

    def flush(self) -> None:
        """Wait until all has left.

        Raises:
            RuntimeError: what gloo says of a message that could not be sent.
        """
        done = threading.Event()
        self._queue.put([done])
        done.wait()
        if self._failure is not None:
            raise self._failure

    def _wait(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item[0], threading.Event):
                item[0].set()
                continue
            try:
                item[0].wait()
            except RuntimeError as error:
                self._failure = error
            del item


class _DeviceOutbox:
    """What NCCL is sending: it tells when that has left."""

    def __init__(self) -> None:
        self._queue: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def add(self, work: dist.Work, data: torch.Tensor) -> None:
        while self._queue and self._queue[0][0].is_completed():
            self._queue.popleft()[0].wait()
        self._queue.append((work, data))

    def flush(self) -> None:
        while self._queue:
            self._queue.popleft()[0].wait()


class Processes:
    """torch.distributed: gloo on CPU, where a channel is a tag, and NCCL on CUDA, which knows none.

    Attributes:
        dp, replica: how many replicas there are, and which of them this process's rank is in.
        group: the ranks of the same stages, one per replica; None where there is one.
    """

    def __init__(self, mesh: Mesh, device: torch.device):
        self.device = device
        self.outbox = _Outbox() if device.type == "cpu" else _DeviceOutbox()
        # every process makes every group, in the same order
        groups = [
            dist.new_group(list(mesh.peers_of(first))) if mesh.dp > 1 else None
            for first in range(mesh.pp)
        ]
        assert mesh.rank is not None
        self.mesh, self.dp, self.replica = mesh, mesh.dp, mesh.replica_of(mesh.rank)
        self.group = groups[mesh.position_of(mesh.rank)]
        self.links: dict[tuple[int, int], dist.ProcessGroup] = {}
        self.abandoned = False

    def open(self, routes: Iterable[tuple[int, int]]) -> None:
        """On CUDA, one communicator, with its stream, for all that one rank sends to another.

        A message waits there for the one before it, so that both ends have to be in the same order:
        the verifier of schedules sees to it (`passes.schedule.verify`), and what is sent once per
        step follows them in an order of its own. Two directions do not wait for each other, and
        the fewer kernels wait at once, the more certain it is that all of them can run.

        A communicator's first use waits for the other end, so each is used once here, all in
        the same order on every rank.

        Raises:
            PeerFailedError: a run failed before.
        """
        if self.abandoned:
            raise PeerFailedError(
                "a run has failed before, and what its ranks sent is still under way: start the "
                "processes again, from a checkpoint"
            )
        if self.device.type != "cuda":
            return
        for src_stage, dst_stage in sorted(set(routes)):
            for replica in range(self.mesh.dp):
                src = self.mesh.rank_of(replica, src_stage)
                dst = self.mesh.rank_of(replica, dst_stage)
                if src == dst or (src, dst) in self.links:
                    continue
                group = self.links[src, dst] = dist.new_group([src, dst])
                probe = torch.zeros(1, device=self.device)
                if self.mesh.rank == src:
                    dist.send(probe, dst, group=group)
                elif self.mesh.rank == dst:
                    dist.recv(probe, src, group=group)

    def send(
        self, src: int, dst: int, values: Values, specs: Sequence[ValueSpec], channel: int = 0
    ) -> None:
        group = self.links.get((src, dst))
        for value, spec in zip(values, specs, strict=True):
            data = wire.to_bytes(value, spec)
            if data.numel():
                work = dist.isend(data, dst, group=group, tag=channel)
                assert work is not None
                self.outbox.add(work, data)
                del work, data  # the outbox alone keeps them

    def receive(
        self,
        src: int,
        dst: int,
        specs: Sequence[ValueSpec],
        device: torch.device,
        channel: int = 0,
    ) -> Pending:
        group = self.links.get((src, dst))
        data = [wire.room_for(spec, device) for spec in specs]
        works = []
        for room in data:
            if room.numel():
                work = dist.irecv(room, src, group=group, tag=channel)
                assert work is not None
                works.append(work)
        return _Receipt(works, data, specs)

    def mean(self, rank: int, ranks: Sequence[int], bucket: torch.Tensor) -> Pending:
        segment = memory.SEGMENT_BYTES // bucket.element_size() // len(ranks) * len(ranks)
        for piece in torch.split(bucket, segment):
            exchanged = torch.empty_like(piece)  # (elements,): this rank's share, dp times
            dist.all_to_all_single(exchanged, piece, group=self.group)
            mine = ordered_mean(exchanged.chunk(len(ranks)))
            _all_gather(piece, mine, group=self.group)
        return Arrived([bucket])

    def scatter(self, blocks: torch.Tensor, sizes: Sequence[int]) -> Pending:
        """Give every other replica r of these stages its block, of ``sizes[r]`` elements.

        The result is one tensor: what each of them gave this rank.
        """
        me = self.replica
        sent = [0 if r == me else size for r, size in enumerate(sizes)]
        received = [0 if r == me else sizes[me] for r in range(len(sizes))]
        room = blocks.new_empty(sum(received))
        work = dist.all_to_all_single(room, blocks, received, sent, group=self.group, async_op=True)
        assert work is not None
        return _Exchange([work], blocks, room)

    def gather(self, mine: torch.Tensor, room: torch.Tensor | None = None) -> Pending:
        """What each replica of these stages gives, all of one size, as one tensor.

        Args:
            room: where to write it.
        """
        if room is None:
            room = mine.new_empty(mine.numel() * self.dp)
        work = _all_gather(room, mine, group=self.group, async_op=True)
        return _Exchange([work], mine, room)

    def share(self, room: torch.Tensor, blocks: Sequence[torch.Tensor]) -> Pending:
        """Each replica of these stages gives all others its block of ``room``, of any size."""
        works = [
            dist.broadcast(block, group=self.group, group_src=replica, async_op=True)
            for replica, block in enumerate(blocks)
            if block.numel()
        ]
        return _Exchange([work for work in works if work is not None], room, room)

    def progress(self) -> int:
        return 0

    def abandon(self) -> None:
        """What has left cannot be called back: nothing is sent or received after it."""
        self.abandoned = True

    def flush(self) -> None:
        self.outbox.flush()

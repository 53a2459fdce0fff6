"""Ranks in processes of their own.

Two of one machine share memory where they compute on CPUs; else it is torch.distributed: gloo, or
NCCL on CUDA.
"""

from __future__ import annotations

import atexit
import functools
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ...compiler.ir.errors import PeerFailedError
from ...compiler.ir.program import ValueSpec
from . import wire
from .doing import HERE
from .joining import new_group
from .mesh import Mesh
from .neighbours import Neighbours
from .replicas import DistributedReplicas, Replicas, SharedReplicas
from .shared_memory import SharedMemory
from .transport import Pending, Values


class Arrived:
    """A `Pending` that is over."""

    def ready(self) -> bool:
        return True

    def wait(self) -> Values:
        return []


class _Receipt:
    """A message under way between processes."""

    def __init__(self, src: int, works: list[dist.Work], rooms: Values, bundle: wire.Bundle):
        self.src, self.works, self.rooms, self.bundle = src, works, rooms, bundle

    def ready(self) -> bool:
        return True

    def wait(self) -> Values:
        with HERE.waiting((self.src,)):
            for work in self.works:
                work.wait()
        return self.bundle.unpack(self.rooms)


class _Outbox:
    """What gloo is sending. Gloo tells that a message has left only to who waits for it.

    So a thread waits, and lets go of the memory; without it a step would keep all that it sent.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._failures: list[RuntimeError] = []
        self._empty = True
        self.thread = threading.Thread(
            target=_see_off,
            args=(self._queue, self._failures),
            name="pipecompile-outbox",
            daemon=True,
        )
        self.thread.start()
        weakref.finalize(self, self._queue.put, []).atexit = False
        _open.add(self)
        _close_at_exit()

    def add(self, works: list[dist.Work], data: Values, dst: int) -> None:
        self._empty = False
        self._queue.put([works, data, dst])

    def close(self) -> None:
        """Nothing more is added."""
        self._queue.put([])
        self.thread.join(0.2)

    def flush(self) -> None:
        """Wait until all has left.

        Raises:
            RuntimeError: what gloo says of a message that could not be sent.
        """
        if self._empty:  # which spares waking the thread, where all goes through memory
            return
        done = threading.Event()
        self._queue.put([done])
        done.wait()
        self._empty = True
        if self._failures:
            raise self._failures[0]


def _see_off(sent: queue.SimpleQueue[list[Any]], failures: list[RuntimeError]) -> None:
    """The thread of an outbox."""
    while item := sent.get():
        if isinstance(item[0], threading.Event):
            item[0].set()
            continue
        try:
            with HERE.waiting((item[2],)):
                _wait_for_all(*item[:2])
        except RuntimeError as error:
            failures.append(error)
        del item


def _wait_for_all(works: list[dist.Work], data: Values) -> None:
    """Each piece is let go of once it has left."""
    while works:
        works[0].wait()
        del works[0], data[0]


_open: weakref.WeakSet[_Outbox] = weakref.WeakSet()


@functools.cache
def _close_at_exit() -> None:
    """Before the group is left, which was joined earlier."""
    atexit.register(_close)


def _close() -> None:
    """Python exits, which must not find a thread inside of gloo: it would be ended there, and the
    process with it ("terminate called without an active exception")."""
    for outbox in _open:
        outbox.close()
        if outbox.thread.is_alive():  # it waits for one that is no more
            HERE.wake()
            outbox.thread.join(2.0)


class _DeviceOutbox:
    """What NCCL is sending: it tells when that has left."""

    def __init__(self) -> None:
        self._queue: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def add(self, works: list[dist.Work], data: Values, dst: int) -> None:
        while self._queue and self._queue[0][0].is_completed():
            self._queue.popleft()[0].wait()
        self._queue.extend(zip(works, data, strict=True))

    def flush(self) -> None:
        while self._queue:
            self._queue.popleft()[0].wait()


class Processes:
    """Shared memory on CPU, where two ranks are of one machine; else torch.distributed: gloo, where
    a channel is a tag, and NCCL on CUDA, which knows none.

    Args:
        neighbours: the processes of this machine, if there are any.

    Attributes:
        dp, replica: how many replicas there are, and which of them this process's rank is in.
        group: the ranks of the same stages, one per replica; None where there is one.
        replicas: the exchange between these.
    """

    def __init__(self, mesh: Mesh, device: torch.device, neighbours: Neighbours | None = None):
        self.device = device
        reached = neighbours is not None and device.type == "cpu"
        self._shared = SharedMemory(neighbours) if reached and neighbours is not None else None
        self._beside = self._shared.ranks if self._shared is not None else frozenset()
        self.outbox = _Outbox() if device.type == "cpu" else _DeviceOutbox()
        # every process makes every group, in the same order
        groups = [
            new_group(mesh.numbering.peers_of(position)) if mesh.dp > 1 else None
            for position in range(mesh.pp)
        ]
        assert mesh.rank is not None
        self.mesh, self.dp, self.replica = mesh, mesh.dp, mesh.replica_of(mesh.rank)
        self.group = groups[mesh.position_of(mesh.rank)]
        self.replicas = self._replicas(mesh.rank, mesh.peers_of(mesh.rank))
        self.links: dict[tuple[int, int], dist.ProcessGroup] = {}
        self._bundles = wire.Known(wire.Bundle)
        self.abandoned = False
        self._sent_bytes = 0  # by what is neither memory nor an exchange between replicas

    @property
    def sent_bytes(self) -> int:
        through_memory = 0 if self._shared is None else self._shared.sent_bytes
        return self._sent_bytes + through_memory + self.replicas.sent_bytes

    def _replicas(self, rank: int, peers: Sequence[int]) -> Replicas:
        if self._shared is not None and self._beside.issuperset(set(peers) - {rank}):
            return SharedReplicas(self._shared, peers, rank)
        return DistributedReplicas(self.group, self.replica, self.dp, peers)

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
        self.check()
        if self.device.type != "cuda":
            return
        for src_stage, dst_stage in sorted(set(routes)):
            for replica in range(self.mesh.dp):
                src = self.mesh.rank_of(replica, src_stage)
                dst = self.mesh.rank_of(replica, dst_stage)
                if src == dst or (src, dst) in self.links:
                    continue
                group = self.links[src, dst] = new_group([src, dst])
                probe = torch.zeros(1, device=self.device)
                with HERE.waiting((src, dst)):
                    if self.mesh.rank == src:
                        dist.send(probe, dst, group=group)
                    elif self.mesh.rank == dst:
                        dist.recv(probe, src, group=group)

    def send(
        self, src: int, dst: int, values: Values, specs: Sequence[ValueSpec], channel: int = 0
    ) -> None:
        if self._shared is not None and dst in self._beside:
            self._shared.send(dst, channel, values, specs)
            return
        group, bundle = self.links.get((src, dst)), self._bundles.of(specs)
        self._sent_bytes += bundle.nbytes
        pieces, works = bundle.pack(values), []
        for piece in pieces:
            work = dist.isend(piece, dst, group=group, tag=channel)
            assert work is not None
            works.append(work)
        if pieces:
            self.outbox.add(works, pieces, dst)  # it alone keeps them

    def receive(
        self,
        src: int,
        dst: int,
        specs: Sequence[ValueSpec],
        device: torch.device,
        channel: int = 0,
    ) -> Pending:
        if self._shared is not None and src in self._beside:
            return self._shared.receive(src, channel, specs)
        group, bundle = self.links.get((src, dst)), self._bundles.of(specs)
        rooms, works = bundle.rooms(device), []
        for room in rooms:
            if room.numel():
                work = dist.irecv(room, src, group=group, tag=channel)
                assert work is not None
                works.append(work)
        return _Receipt(src, works, rooms, bundle)

    def mean(self, rank: int, ranks: Sequence[int], bucket: torch.Tensor) -> Pending:
        self.replicas.mean_(bucket)
        return Arrived()

    def progress(self) -> int:
        return 0

    def check(self) -> None:
        if self.abandoned:
            raise PeerFailedError(
                "a run has failed before: ranks may have taken other numbers of steps, and what "
                "they sent is still under way: start the processes again, from a checkpoint"
            )

    def abandon(self) -> None:
        """What has left cannot be called back: nothing is sent or received after it."""
        self.abandoned = True

    def flush(self) -> None:
        self.outbox.flush()

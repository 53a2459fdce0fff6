"""Watches over the processes of a run: tells who is waited for, and who has died.

One light thread per process. It tells the store about once per second where its process is, hears
at once of the end of another one on its machine, and looks whether its own has waited for long.

    a process dies      the first that sees it writes so to the store · all others wake what waits
    a rank is waited for    after FIRST_S, and then ever less often, a line says for whom, and where
                        that one is · after timeout_s the run ends, on every rank
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from ..transport import joining
from ..transport.doing import AT_WORK, ENDED, FAILED, HERE, Doing
from ..transport.mesh import Mesh
from ..transport.quick_store import QuickStore, StoreSilentError
from .peers import SILENT_S, Peer, beat_of, host_name, identity, label

POLL_S = 0.5  # between two looks
BEAT_S = 1.0  # between two beats
LISTEN_S = 2.0  # who has waited so long listens to those that it waits for
GRACE_S = 5.0  # what a rank that others gave up has for ending by itself
PATIENCE_S = 30.0  # for an explanation, once a rank has begun to be silent
_MOST_NAMED = 4

_ADVICE = (
    "its process was killed (kill -9, out of memory) or has crashed; its own output and the "
    "system's log may say more"
)


@dataclass(frozen=True)
class Loss:
    """Ranks that the run has lost, as the first says that has seen it.

    Attributes:
        order, inside: the call that it was lost in, or after.
        stalled: they are given up, and may still be there.
    """

    ranks: Sequence[int]
    text: str
    order: int = 0
    inside: bool = True
    stalled: bool = False


class Lookout:
    """Of one process.

    Args:
        store: of this attempt; no other thread uses it.
        doing: where the process is.
        group: the default one; the lookout ends with it.

    Attributes:
        mesh: of the pipeline made last, for the names of ranks.
        timeout_s: how long this process may wait for another.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store,
        timeout_s: float,
        doing: Doing = HERE,
        group: dist.ProcessGroup | None = None,
    ):
        self.rank, self.size, self.timeout_s, self._doing = rank, size, timeout_s, doing
        self.mesh: Mesh | None = None
        self.group = group
        self.peers: dict[int, Peer] = {}
        self._hosts = {rank: host_name()}
        self._store: QuickStore | None = QuickStore(store)
        self._loss: Loss | None = None
        self._beats = 0
        self._due = self._told = 0.0
        self._spot: tuple[object, ...] = ()
        self._since = time.monotonic()
        self._bell, self._ring = socket.socketpair()
        self._poll = select.poll()
        self._poll.register(self._bell.fileno(), select.POLLIN)
        self._over = self._explains = False
        self._listen_to: Collection[int] = ()
        self._answered = time.monotonic()
        store.set(f"who/{rank}", identity(doing))
        self._meet(store)
        self._thread = threading.Thread(target=self._run, daemon=True, name="pipecompile-lookout")
        self._thread.start()

    def _meet(self, store: Any) -> None:
        """The others; they are here, and come to this too."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        keys = [f"who/{rank}" for rank in others]
        told = store.multi_get(keys) if store.has_extended_api() else map(store.get, keys)
        for rank, each in zip(others, told, strict=True):
            peer = self.peers[rank] = Peer.of(rank, each.decode())
            self._hosts[rank] = peer.host
            if peer.watch >= 0:
                self._poll.register(peer.watch, select.POLLIN)

    def stop(self) -> None:
        """End the thread; it says first what has become of this process."""
        self._over = True
        self._ring.send(b"!")
        self._thread.join(2.0)

    def name(self, rank: int) -> str:
        """With its machine, where there are several."""
        hosts = self._hosts
        return label(rank, self.mesh, hosts[rank] if len(set(hosts.values())) > 1 else "")

    def failure(self) -> str | None:
        """Why this process's call cannot succeed any more; None where nothing is known."""
        loss = self._loss
        if loss is None:
            return None
        place = self._doing.place
        concerns = loss.stalled or (
            place.inside and place.order >= loss.order + (0 if loss.inside else 1)
        )
        return loss.text if concerns else None

    def explain(self) -> str | None:
        """Why another rank's connection is closed, if that can be found out in some seconds.

        A process that starts to be silent is waited for until it is known to be: on a machine that
        is busy the thread that listens comes late.
        """
        self._explains = True
        try:
            return self._explained(time.monotonic())
        finally:
            self._explains = False

    def _explained(self, started: float) -> str | None:
        while True:
            if (failure := self.failure()) is not None:
                return failure
            here = self._doing.place
            peers = list(self.peers.values())
            for peer in peers:
                if peer.place.fate == ENDED and peer.place.order <= here.order:
                    return (
                        f"{self.name(peer.rank)} {peer.state()}, and rank {self.rank} is {here}: "
                        "every rank must make the same calls of a pipeline"
                    )
                if peer.place.fate != AT_WORK:
                    return None  # it has told its own error
            if gone := [peer for peer in peers if peer.silent and not peer.stopped and peer.beat]:
                return f"{self.name(gone[0].rank)} {gone[0].state()}"
            if self._lost():
                return f"{self.name(0)}, which keeps the store of this run, has ended: {_ADVICE}"
            waited = time.monotonic() - started
            about_to = any(
                peer.beat and peer.silent_s() > 2 * BEAT_S and not peer.stopped for peer in peers
            )
            if waited > (PATIENCE_S if about_to else SILENT_S + 2 * BEAT_S):
                return None
            time.sleep(0.05)

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        self._talk()  # who dies at once was there
        while not self._over and self.group in (None, dist.group.WORLD):
            events = self._poll.poll(1000 * POLL_S)
            ended = {number for number, _ in events}
            for peer in list(self.peers.values()):
                if peer.watch in ended:
                    self._poll.unregister(peer.watch)
                    peer.close()
                    self._died(peer)
            self._talk()
            self._look()
        self._due = 0.0
        self._talk()
        self._store = None

    def _talk(self) -> None:
        """With the store: what this process does, what others do, and who is lost."""
        store, now = self._store, time.monotonic()
        if store is None:
            return
        try:
            if now >= self._due:
                self._beats, self._due = self._beats + 1, now + BEAT_S
                beat = beat_of(self._beats, self._doing, now - self._since)
                store.set(f"beat/{self.rank}", beat)
            listen_to = range(self.size) if self._explains else self._listen_to
            for rank in listen_to:
                if rank != self.rank:
                    self.peers[rank].listen(store)
            if self._loss is None and store.check(["loss"]):
                self._take(Loss(**json.loads(store.get("loss"))))
            self._answered = now
            for rank, peer in self.peers.items():
                if rank not in listen_to:
                    peer.heard = now  # it may speak: nobody listens
        except StoreSilentError:  # the network to it may be interrupted
            pass
        except Exception:  # whoever kept it is gone
            self._store = None

    def _lost(self) -> bool:
        """Whether the store is gone, and rank 0 with it, which kept it."""
        gone = self._store is None and not self._over
        return gone and self.rank != 0 and not joining.has_agent_store()

    def _died(self, peer: Peer) -> None:
        peer.ended = True
        with suppress(Exception):
            if peer.page is None and self._store is not None:
                peer.listen(self._store)
        place = peer.place
        if place.fate == AT_WORK:
            text = f"{self.name(peer.rank)} {peer.state()}: {_ADVICE}"
            self._publish(Loss([peer.rank], text, place.order, place.inside))

    def _publish(self, loss: Loss) -> None:
        """Tell the others, unless one of them was first."""
        if self._loss is not None:
            return
        with suppress(Exception):
            if self._store is not None:
                if self._store.add("losses", 1) == 1:
                    self._store.set("loss", json.dumps(asdict(loss)))
                else:
                    loss = Loss(**json.loads(self._store.get("loss")))
        self._take(loss)

    def _take(self, loss: Loss) -> None:
        self._loss, self._lost_at = loss, time.monotonic()

    def _look(self) -> None:
        """Whether this process has waited for too long, or waits for one that is lost."""
        now, place = time.monotonic(), self._doing.place
        if self._loss is not None:
            self._give_up(self._loss, now)
            return
        waits = self._doing.waits() if place.inside else []
        spot = (waits[0].since,) if waits else (place.order, place.action, place.inside)
        if spot != self._spot:
            self._spot, self._told = spot, 0.0
            self._since = waits[0].since if waits else now
        waited = now - self._since
        if not place.inside or waited < LISTEN_S:
            self._listen_to = ()
            return
        others = tuple(rank for rank in waits[0].ranks if rank != self.rank) if waits else ()
        ranks = others or tuple(self.peers)
        roots = self._roots(ranks)
        self._listen_to = {*ranks, *self._roots(ranks, all_of_them=True)}
        if not waits:  # it may be at work itself: only what is seen of others counts
            roots = [r for r in roots if self.peers[r].stopped or self.peers[r].silent]
        text = self._waited(waited, ranks if waits else (), roots)
        if waited >= self.timeout_s and roots:
            self._publish(Loss(roots, f"{text}. {_limit(self.timeout_s)}", stalled=True))
        elif waited >= max(joining.FIRST_S, 2 * self._told):
            self._told = waited
            print(f"pipecompile: {text}", file=sys.stderr, flush=True)

    def _give_up(self, loss: Loss, now: float) -> None:
        """Wake what waits here; what is still there after a while is ended."""
        if self.failure() is None:
            return
        if self._doing.waits():
            self._doing.wake()
        outside = self.rank in loss.ranks and not self._doing.place.inside
        if outside and now - self._lost_at > GRACE_S:
            end(self._doing, self.rank, loss.text)

    @property
    def _cut_off(self) -> bool:
        """Whether the store does not answer, so that nothing is heard of anybody."""
        return self._store is not None and time.monotonic() - self._answered > SILENT_S

    def _roots(self, ranks: Sequence[int], all_of_them: bool = False) -> list[int]:
        """Those that do not wait for others themselves, of these and all that they wait for."""
        far = [rank for rank, peer in self.peers.items() if not peer.pid]
        if self._cut_off and far:  # those of this machine wait for them too, or will
            return [rank for rank in ranks if rank in far] or far
        seen: dict[int, bool] = {}
        queue = deque(ranks)
        while queue:
            rank = queue.popleft()
            if rank == self.rank or rank in seen:
                continue
            onward = self.peers[rank].waits_for
            seen[rank] = not onward
            queue.extend(onward)
        return [r for r, root in seen.items() if root or all_of_them] or list(ranks)

    def _waited(self, seconds: float, ranks: Sequence[int], roots: Sequence[int]) -> str:
        """The line that says for whom."""
        place = self._doing.place
        here = self.name(self.rank)
        if not ranks:
            said = f"{here} has been {place} for {seconds:.0f} s"
            return f"{said}, and {self._states(roots, ' ')}" if roots else said
        beyond = len(ranks) == 1 and ranks[0] not in roots
        way = f"{self.name(ranks[0])}, and that for " if beyond else ""
        return (
            f"{here} has waited {seconds:.0f} s {place} for {way}{self._states(roots, ', which ')}"
        )

    def _states(self, ranks: Sequence[int], link: str) -> str:
        named = [
            f"{self.name(rank)}{link}{self.peers[rank].state()}" for rank in ranks[:_MOST_NAMED]
        ]
        more = [f"{len(ranks) - _MOST_NAMED} more"] if len(ranks) > _MOST_NAMED else []
        return "; and for ".join([*named, *more])


def _limit(timeout_s: float) -> str:
    return (
        f"That is longer than timeout_s={timeout_s:g}, so the run ends; if it is no fault, give "
        "compile() a longer one"
    )


def end(doing: Doing, rank: int, why: str) -> None:
    """End this process, which is blocked."""
    print(f"pipecompile: rank {rank} stops: {why}", file=sys.stderr)
    sys.stderr.flush()
    doing.end(FAILED)
    os._exit(1)


_lookouts: list[Lookout] = []
"""Of this process: one, or none."""


def lookout_of(mesh: Mesh, timeout_s: float) -> Lookout:
    """That of this process, which has joined the others; the same for all its pipelines."""
    assert mesh.rank is not None
    world = dist.group.WORLD
    if _lookouts and _lookouts[0].group is not world:
        stop()
    if not _lookouts:
        store = joining.run_store()
        _lookouts.append(Lookout(mesh.rank, mesh.size, store, timeout_s, group=world))
    _lookouts[0].mesh, _lookouts[0].timeout_s = mesh, timeout_s
    return _lookouts[0]


def stop() -> None:
    """End that of this process."""
    for lookout in _lookouts:
        lookout.stop()
    _lookouts.clear()

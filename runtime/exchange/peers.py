"""What this process knows of the others of a run: whether they live, and what they said last.

Of one on the same machine it has the page on which that says where it is (`transport.doing`), hears
at once when it ends, and sees whether it is stopped. One of another machine tells the store about
once per second.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..transport.doing import AT_WORK, ENDED, Doing, Place, place_of
from ..transport.mesh import Mesh
from ..transport.quick_store import QuickStore

SILENT_S = 4.0  # who says nothing for so long is stopped, or gone
_SPACE = Path("/proc/self/ns/pid")
_MACHINE = Path("/proc/sys/kernel/random/boot_id")


def label(rank: int, mesh: Mesh | None, host: str = "") -> str:
    """``rank 3 (stage 1, replica 1)``, or ``rank 3 (stage 1, replica 1, on node7)``."""
    told = [f"on {host}"] if host else []
    if mesh is not None and 0 <= rank < mesh.size:
        stages = mesh.stages_of(rank)
        several = f"stage{'s'[: len(stages) > 1]} {' and '.join(map(str, stages))}"
        told = [several, f"replica {mesh.replica_of(rank)}", *told]
    return f"rank {rank} ({', '.join(told)})" if told else f"rank {rank}"


def machine() -> str:
    """The same in processes that see each other; "" where that cannot be told."""
    with suppress(OSError):
        return f"{_MACHINE.read_text().strip()} {_SPACE.readlink()}"
    return ""


def host_name() -> str:
    """By which people know this machine."""
    return socket.gethostname()


def identity(doing: Doing) -> str:
    """How others find this process."""
    mine = [machine(), os.getpid(), _state(os.getpid())[1], doing.share(), host_name()]
    return json.dumps(mine)


def _state(pid: int) -> tuple[str, str]:
    """Of a process: one letter for what it does ("" where it is no more), and when it began."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


@dataclass
class Peer:
    """Another rank.

    Attributes:
        host: the name of its machine.
        watch: a file that can be read once it has ended; -1 where there is none.
        beat: what it told the store last.
        heard: when that was, by this process's clock.
        ended: whether it has.
    """

    rank: int
    host: str = ""
    pid: int = 0
    born: str = ""
    watch: int = -1
    page: Any = None
    beat: dict[str, Any] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    ended: bool = False

    @classmethod
    def of(cls, rank: int, told: str) -> Peer:
        """From its identity; what is on this machine is opened."""
        where, pid, born, file, host = json.loads(told)
        peer = cls(rank, host)
        if not where or where != machine():
            return peer
        with suppress(OSError):
            watch = os.pidfd_open(pid)
            if _state(pid)[1] != born:  # another process has its number by now
                os.close(watch)
                peer.ended = True
                return peer
            peer.pid, peer.born, peer.watch = pid, born, watch
            with suppress(OSError, ValueError), Path(f"/proc/{pid}/fd/{file}").open("rb") as page:
                peer.page = mmap.mmap(page.fileno(), 0, access=mmap.ACCESS_READ)
        return peer

    def close(self) -> None:
        if self.watch >= 0:
            os.close(self.watch)
            self.watch = -1

    @property
    def place(self) -> Place:
        """Where it is, or was when it said so last."""
        if self.page is not None:
            return place_of(self.page)
        if not self.beat:
            return Place()
        told = {name: self.beat[name] for name in ("action", "call", "inside", "order")}
        return Place(**told, fate=self.beat["fate"].encode())

    @property
    def stopped(self) -> bool:
        """By a signal or a debugger, as far as that can be seen from here."""
        return bool(self.pid) and not self.ended and _state(self.pid)[0] in ("T", "t")

    def listen(self, store: QuickStore) -> None:
        """Take in what it told the store last."""
        key = f"beat/{self.rank}"
        if store.check([key]):
            beat = json.loads(store.get(key))
            if beat.get("number") != self.beat.get("number"):
                self.beat, self.heard = beat, time.monotonic()

    def silent_s(self) -> float:
        """Since when nothing was heard of it."""
        return time.monotonic() - self.heard

    @property
    def silent(self) -> bool:
        return self.silent_s() > SILENT_S

    @property
    def waits_for(self) -> list[int]:
        """The ranks that it waits for, where it is able to say so."""
        return [] if self.silent or self.stopped or self.ended else list(self.beat.get("waits", ()))

    def state(self) -> str:
        """What can be said of it where others wait for it."""
        place = self.place
        if place.fate == ENDED:
            after = f"after {place.call}" if place.call else "before any call of a pipeline"
            return f"has ended its script {place if place.inside else after}"
        if self.ended:
            return f"died {place}"
        if self.stopped:
            return f"is stopped (as by SIGSTOP) {place}"
        if self.silent:
            runs = "its process runs, but its Python does not" if self.pid else "it, its machine or"
            runs += "" if self.pid else " the network between is stopped or gone"
            said = f"has not been heard of for {self.silent_s():.0f} s ({runs})"
            heard = self.page is not None or self.beat
            return f"{said}, and was {place} when it was" if heard else said
        since = self.beat.get("for_s", 0.0) + self.silent_s()
        return f"is alive, {place} for {since:.0f} s"


def beat_of(number: int, doing: Doing, for_s: float) -> str:
    """What this process tells the store."""
    place = doing.place
    waits = doing.waits()
    return json.dumps(
        {
            "number": number,
            "action": place.action,
            "call": place.call,
            "inside": place.inside,
            "order": place.order,
            "fate": (place.fate if place.fate.strip(b"\0") else AT_WORK).decode(),
            "waits": list(waits[0].ranks) if waits else [],
            "for_s": for_s,
        }
    )

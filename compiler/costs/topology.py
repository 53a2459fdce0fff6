"""Machines and the network between them: which ranks share one, over which link two ranks talk.

torchrun numbers the processes of one machine one after the other, so ranks that are neighbours in
number share it. These are the ranks of a replica, or the replicas of a stage:

    2 machines of 2, 2 stages × 2 replicas        machine 0          machine 1
    "pipeline"   a replica's ranks together      stage 0, stage 1   stage 0, stage 1
    "replicas"   a stage's replicas together     stage 0, stage 0   stage 1, stage 1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache

from ..ir.errors import OptionError

ORDERS = ("pipeline", "replicas")


@dataclass(frozen=True)
class Numbering:
    """Of ranks.

    Attributes:
        pp: ranks of a replica, whose positions in it are 0 to pp − 1.
        dp: replicas.
        order: of `ORDERS`: of what neighbours in number are a part.
    """

    pp: int
    dp: int
    order: str = ORDERS[0]

    def replica_of(self, rank: int) -> int:
        return rank // self.pp if self.order == "pipeline" else rank % self.dp

    def position_of(self, rank: int) -> int:
        """Which of the ranks of its replica it is."""
        return rank % self.pp if self.order == "pipeline" else rank // self.dp

    def rank_of(self, replica: int, position: int) -> int:
        if self.order == "pipeline":
            return replica * self.pp + position
        return position * self.dp + replica

    def peers_of(self, position: int) -> tuple[int, ...]:
        """The ranks at a position, one per replica."""
        return tuple(self.rank_of(replica, position) for replica in range(self.dp))


@dataclass(frozen=True)
class Topology:
    """Of machines that are alike.

    Attributes:
        devices: of a machine.
        bytes_per_s: bandwidth of one direction from a device to one of another machine.
        latency_s: seconds of a message of no bytes between them.
        oversubscription: by how much less each device has where all of a machine send to others at
            once; 1 where the network carries that.
        hosts: per rank, the number of its machine; where it is left out, ranks fill one machine
            after the other.
    """

    devices: int
    bytes_per_s: float
    latency_s: float
    oversubscription: float = 1.0
    hosts: tuple[int, ...] = ()

    def host_of(self, rank: int) -> int:
        return self.hosts[rank] if self.hosts else rank // self.devices

    def shared(self, senders: int) -> float:
        """Bytes per second that each of so many devices of a machine has to other machines, where
        they send at once."""
        return self.bytes_per_s / max(1.0, self.oversubscription * senders / self.devices)


def topology_of(given: object, where: str) -> Topology:
    """From the fields of `Topology`, but for ``hosts``, which are seen when a run begins.

    Raises:
        OptionError: it does not describe one.
    """
    told = {f.name: f for f in fields(Topology) if f.name != "hosts"}
    if isinstance(given, dict) and not given.get("hosts"):
        given = {name: value for name, value in given.items() if name != "hosts"}
    if not isinstance(given, dict) or not given.keys() <= told.keys():
        raise OptionError(f"{where}: topology must be an object with {', '.join(told)}")
    for name, each in told.items():
        if name not in given and each.default is MISSING:
            raise OptionError(f"{where}: field {name!r} of the topology is missing")
    for name, value in given.items():
        check_figure(f"{where}: topology.{name}", name, value)
    return Topology(**given)


def check_figure(what: str, name: str, value: object) -> None:
    """Raises OptionError for a value that a field of `Topology` cannot have."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "devices":
        possible, need = isinstance(value, int) and number and value >= 1, "an int of 1 or more"
    elif name == "latency_s":
        possible, need = number and value >= 0, "a number of 0 or more"  # type: ignore[operator]
    elif name == "oversubscription":
        possible, need = number and value >= 1, "a number of 1 or more"  # type: ignore[operator]
    else:
        possible, need = number and value > 0, "a number above 0"  # type: ignore[operator]
    if not possible:
        raise OptionError(f"{what}={value!r} must be {need}")


@dataclass(frozen=True)
class Exchange:
    """How the replicas at hand exchange gradients: measured.

    Attributes:
        bytes_per_s: of what a replica gives others, packed, sent and added up there.
        latency_s: of one that is empty.
        share: of the seconds, those in which a rank's processor is busy with it.
    """

    bytes_per_s: float
    latency_s: float
    share: float


@dataclass(frozen=True)
class Placed:
    """The ranks of a run on machines."""

    topology: Topology
    numbering: Numbering

    def message(self, src: int, dst: int) -> tuple[float, float] | None:
        """Bytes per second and latency of messages from one position of a replica to another, in
        the replica that has the least; None where none of them leaves its machine.

        Replicas are in step: those of one machine that send to others do so at once.
        """
        return _message(self, src, dst)

    def beside(self, position: int) -> int:
        """How many other replicas of what is at a position share a machine, at most."""
        hosts = map(self.topology.host_of, self.numbering.peers_of(position))
        return max(Counter(hosts).values()) - 1

    def exchange(self) -> tuple[float, float] | None:
        """The same of what the replicas of a stage exchange, of the stage that has the least; all
        stages at once."""
        return _exchange(self)


@lru_cache(maxsize=4096)
def _message(placed: Placed, src: int, dst: int) -> tuple[float, float] | None:
    numbering = placed.numbering
    pairs = [
        (numbering.rank_of(replica, src), numbering.rank_of(replica, dst))
        for replica in range(numbering.dp)
    ]
    host = placed.topology.host_of
    return _least(placed.topology, (a for a, b in pairs if host(a) != host(b)))


@lru_cache(maxsize=4096)
def _exchange(placed: Placed) -> tuple[float, float] | None:
    numbering = placed.numbering
    host: Callable[[int], int] = placed.topology.host_of
    far: list[int] = []
    for position in range(numbering.pp):
        peers = numbering.peers_of(position)
        if len({host(rank) for rank in peers}) > 1:
            far += peers
    return _least(placed.topology, far)


def _least(topology: Topology, senders: Iterable[int]) -> tuple[float, float] | None:
    """Of the machine from which most send."""
    counts = Counter(map(topology.host_of, senders))
    if not counts:
        return None
    return topology.shared(max(counts.values())), topology.latency_s

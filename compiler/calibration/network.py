"""Seconds of collectives, by size, number of ranks and topology.

Rings, as NCCL has them for gathers and scatters of many bytes: every rank passes on all parts but
its own, at the rate of the slowest link, and the first part arrives after as many hops as there are
ranks. Within a machine ranks have links of their own; between machines a device has its share
of the network. (Chan et al., Collective communication: theory, practice, and experience, 2007.)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """What collectives reach.

    Attributes:
        per_machine: devices of a machine.
        within_bytes_per_s: in one direction, of each device, between those of a machine.
        between_bytes_per_s: of a machine's network, for each of its devices.
        within_latency_s, between_latency_s: of a hop.
        start_s: of every collective, until its kernel runs on all ranks.
    """

    per_machine: int
    within_bytes_per_s: float
    between_bytes_per_s: float
    within_latency_s: float
    between_latency_s: float
    start_s: float

    def machines(self, ranks: int) -> int:
        return -(-ranks // self.per_machine)

    def bytes_per_s(self, ranks: int) -> float:
        """At which a rank passes on: a ring over machines crosses each network once for all of
        the machine's devices, which share it."""
        if ranks <= self.per_machine:
            return self.within_bytes_per_s
        return min(self.within_bytes_per_s, self.between_bytes_per_s * self.per_machine)

    def collective_s(self, nbytes: float, ranks: int) -> float:
        """Of a gather or a scatter with sums.

        Args:
            nbytes: of all ranks' parts together.
        """
        if ranks == 1 or not nbytes:
            return 0.0
        machines = self.machines(ranks)
        hops_s = (ranks - machines) * self.within_latency_s
        hops_s += (machines if machines > 1 else 0) * self.between_latency_s
        return self.start_s + hops_s + nbytes * (ranks - 1) / ranks / self.bytes_per_s(ranks)

"""Devices of several kinds in one pipeline: how many of each, in which machines, and which rank has
which."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..ir.errors import OptionError
from .hardware import CHANGED, Device, described, parse_device
from .topology import Numbering, Placed, Topology, topology_of

BOTH = " and "
_NAMED = re.compile(r"[^:,]+:\d+(,[^:,]+:\d+)*")


@dataclass(frozen=True)
class Cluster:
    """Devices in the order in which machines have them: ``Cluster((("a100", 4), ("l4", 4)))``.

    Every replica has as many of each kind. Which of its ranks has which is planned, or given where
    processes are on them already.

    Attributes:
        devices: (a device or its name, how many).
        topology: of the machines, which they fill one after the other; None where all are in one.
        free: plans decide which rank has which; else rank r has the r-th.
        mixes: ranks that are replicas of each other may have several kinds, and are as slow as the
            slowest; else that is an error.
        numbering: of the ranks, where it is known.
        settings: what was changed of the machines, for the name.
    """

    devices: tuple[tuple[Device | str, int], ...]
    topology: Topology | None = None
    free: bool = True
    mixes: bool = False
    numbering: Numbering | None = None
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises OptionError for unknown devices, numbers below 1, and what no pipeline has."""
        given = tuple((parse_device(device), count) for device, count in self.devices)
        object.__setattr__(self, "devices", given)
        if not given:
            raise OptionError("a cluster needs at least one kind of device")
        for device, count in given:
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise OptionError(f"{device.name}: {count!r} devices: give an int of 1 or more")
            if device.cluster is not None:
                raise OptionError(f"{device.name} is a cluster, and no device of one")
            if device != self.kinds[device.name]:
                raise OptionError(f"two kinds of devices are called {device.name!r}: rename one")
        if len({device.is_cpu for device in self.kinds.values()}) > 1:
            raise OptionError(
                f"{self.name}: graphs are traced for CPUs or for GPUs, so a pipeline has either"
            )

    @cached_property
    def members(self) -> tuple[Device, ...]:
        """One by one."""
        pairs = [(parse_device(device), count) for device, count in self.devices]
        return tuple(device for device, count in pairs for _ in range(count))

    @cached_property
    def kinds(self) -> dict[str, Device]:
        """By name, in order."""
        found: dict[str, Device] = {}
        for device, _ in self.devices:
            found.setdefault(parse_device(device).name, parse_device(device))
        return found

    @property
    def name(self) -> str:
        """As it is written, without the machines."""
        pairs = ((parse_device(device).name, count) for device, count in self.devices)
        own = ",".join(f"{name}:{count}" for name, count in pairs)
        return own + CHANGED + " ".join(self.settings) if self.settings else own

    @property
    def whole(self) -> Device:
        """The device that stands for all where one has to: the first kind, with the least memory.
        Its ranks are not known yet (`Device.with_ranks`)."""
        first = next(iter(self.kinds.values()))
        least = min(device.memory_bytes for device in self.kinds.values())
        return replace(
            first, name=self.name, memory_bytes=least, topology=self.topology, cluster=self
        )

    def changed(self, change: Callable[[Device], Device]) -> Device:
        """The whole, with other devices under the same names."""
        given = tuple((change(parse_device(device)), count) for device, count in self.devices)
        return replace(self, devices=given).whole

    def within(self, topology: Topology | None, settings: Sequence[str] = ()) -> Device:
        """The whole in other machines.

        Args:
            settings: what made them others, for the name.
        """
        told = tuple(settings) or self.settings
        return replace(self, topology=topology, settings=told).whole

    def as_they_are(self) -> Device:
        """The whole, whose ranks have the devices in order."""
        return replace(self, free=False).whole

    def of_replica(self, numbering: Numbering) -> Counter[str]:
        """How many of each kind a replica has.

        Raises:
            OptionError: there are more or fewer devices than ranks, or replicas cannot be alike.
        """
        total, ranks = len(self.members), numbering.pp * numbering.dp
        if total != ranks:
            raise OptionError(
                f"hardware={self.name!r} has {total} devices, and n_stages={numbering.pp} × "
                f"dp={numbering.dp} are {ranks} ranks: give as many of one as of the other"
            )
        counts = Counter(device.name for device in self.members)
        for name, count in counts.items():
            if count % numbering.dp and not self.mixes:
                raise OptionError(
                    f"hardware={self.name!r}: replicas are alike, and dp={numbering.dp} does not "
                    f"divide {count} × {name}: use another number of replicas"
                )
        return Counter({name: count // numbering.dp for name, count in counts.items()})

    def orders(self, numbering: Numbering) -> Iterator[tuple[str, ...]]:
        """The kinds of a replica's ranks, in every order there is: those first in which neighbours
        differ least often."""
        counts = self.of_replica(numbering)
        if not self.free:
            yield self._listed(numbering)
            return
        for runs in range(len(counts), numbering.pp + 1):
            yield from _in_runs(counts, runs, "")

    def seated(self, numbering: Numbering, order: Sequence[str] = ()) -> Device:
        """The whole with its ranks, in an order; in the first of `orders` where none is given.

        Raises:
            OptionError: as `of_replica`; or replicas differ in what their ranks have.
        """
        counts = self.of_replica(numbering)
        order = tuple(order) or next(self.orders(numbering))
        fits = Counter(order) == counts if self.free else order == self._listed(numbering)
        if not fits:
            raise OptionError(
                f"the plan has {', '.join(order)} in a replica, hardware={self.name!r} "
                f"{', '.join(next(self.orders(numbering)))}: make a new plan"
            )
        own, topology = replace(self, numbering=numbering), self.topology
        placed = None
        if topology is not None:
            numbers = self._numbers(numbering, order)
            hosts = topology.hosts or tuple(number // topology.devices for number in numbers)
            topology = replace(topology, hosts=hosts)
            placed = Placed(topology, numbering)
        ranks = tuple(replace(self._kind(name), topology=topology, placed=placed) for name in order)
        whole = replace(self.whole, topology=topology, placed=placed)
        return replace(whole, cluster=own, ranks=ranks)

    def parts(self, name: str) -> tuple[str, ...]:
        """The kinds that ranks of a kind have: several where their replicas have."""
        return (name,) if name in self.kinds else tuple(name.split(BOTH))

    def _kind(self, name: str) -> Device:
        """A kind, or what stands for several: the slower figures, and the smaller memory."""
        first, *others = (self.kinds[part] for part in self.parts(name))
        for other in others:
            dtypes = {*first.flops_per_s, *other.flops_per_s}
            slower = min(first, other, key=lambda device: device.peak("bfloat16"))
            first = replace(
                slower,
                name=name,
                flops_per_s={d: min(first.peak(d), other.peak(d)) for d in sorted(dtypes)},
                bytes_per_s=min(first.bytes_per_s, other.bytes_per_s),
                memory_bytes=min(first.memory_bytes, other.memory_bytes),
                launch_s=max(first.launch_s, other.launch_s),
            )
        return first

    def _numbers(self, numbering: Numbering, order: Sequence[str]) -> list[int]:
        """Per rank of all replicas, its number among the members: the next of its kind."""
        if not self.free:
            return list(range(len(self.members)))
        left: dict[str, list[int]] = {name: [] for name in self.kinds}
        for number, device in enumerate(self.members):
            left[device.name].append(number)
        ranks = range(len(self.members))
        return [left[order[numbering.position_of(rank)]].pop(0) for rank in ranks]

    def _listed(self, numbering: Numbering) -> tuple[str, ...]:
        rows = [
            tuple(
                self.members[numbering.rank_of(replica, position)].name
                for position in range(numbering.pp)
            )
            for replica in range(numbering.dp)
        ]
        if self.mixes:
            return tuple(BOTH.join(sorted(set(kinds))) for kinds in zip(*rows, strict=True))
        if len(set(rows)) > 1:
            other = next(row for row in rows if row != rows[0])
            raise OptionError(
                f"hardware={self.name!r} gives ranks in order {', '.join(rows[0])} in one replica "
                f"and {', '.join(other)} in another: replicas are alike, so list the devices in "
                "another order, or choose placement="
            )
        return rows[0]


def kinds_at(device: Device, rank: int) -> tuple[str, ...]:
    """The kinds that a rank of a replica has, in all replicas; ("",) where all are alike."""
    if device.cluster is None or not device.ranks:
        return ("",)
    return device.cluster.parts(device.ranks[rank].name)


def cluster_of(devices: Sequence[Device]) -> Device:
    """Of devices that are where they are, one for each rank; of one kind that alone.

    Those of a name are alike, with the least memory that one of them has.
    """
    least: dict[str, Device] = {}
    for device in devices:
        known = least.setdefault(device.name, device)
        least[device.name] = min(known, device, key=lambda each: each.memory_bytes)
    if len(least) == 1:
        return least[devices[0].name]
    runs = itertools.groupby(device.name for device in devices)
    pairs = tuple((least[name], len(list(run))) for name, run in runs)
    return Cluster(pairs, free=False, mixes=True).whole


def _in_runs(counts: Counter[str], runs: int, before: str) -> Iterator[tuple[str, ...]]:
    """Orders of so many of each kind that have so many runs of one kind."""
    left = sum(counts.values())
    if not left or not runs:
        if not left and not runs:
            yield ()
        return
    if not sum(count > 0 for count in counts.values()) <= runs <= left:
        return
    for name, count in counts.items():
        for taken in range(count, 0, -1) if name != before else ():
            for rest in _in_runs(counts - Counter({name: taken}), runs - 1, name):
                yield (name,) * taken + rest


def parse_hardware(wanted: str | Path | Device | Cluster) -> Device:
    """What `parse_device` takes, a cluster, how many of which devices ("a100:4,l4:4"), or a JSON
    file that describes a cluster.

    Raises:
        OptionError: no such device or file, or a file that describes neither.
    """
    if isinstance(wanted, Cluster):
        return wanted.whole
    if isinstance(wanted, str) and _NAMED.fullmatch(wanted) and not Path(wanted).is_file():
        pairs = (each.rsplit(":", 1) for each in wanted.split(","))
        return Cluster(tuple((name, int(count)) for name, count in pairs)).whole
    if isinstance(wanted, (str, Path)) and Path(wanted).expanduser().suffix == ".json":
        given = _read(Path(wanted).expanduser())
        if isinstance(given, dict) and "devices" in given:
            return _cluster(given, f"cluster file {wanted}").whole
    return parse_device(wanted)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # which `parse_device` tells
        return None


def _cluster(given: dict[str, Any], where: str) -> Cluster:
    if odd := sorted(given.keys() - {"devices", "topology"}):
        raise OptionError(f"{where}: unknown field {odd[0]!r}: known are devices, topology")
    rows = given["devices"]
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and row.keys() == {"device", "count"} for row in rows
    ):
        raise OptionError(f'{where}: devices must be a list of {{"device": …, "count": …}}')
    devices = []
    for number, row in enumerate(rows):
        device = row["device"]
        if isinstance(device, dict):
            device = described(device, f"{where}, device {number}")
        elif not isinstance(device, str):
            raise OptionError(
                f"{where}, device {number}: give a name, the path of a JSON file, or an object"
            )
        devices.append((device, row["count"]))
    topology = given.get("topology")
    placed = None if topology is None else topology_of(topology, where)
    return Cluster(tuple(devices), placed)

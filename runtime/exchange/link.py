"""Measures the link between ranks: what a message of n bytes takes is latency + n / bandwidth, and
some of that is the sender's own time; and what replicas exchange."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from ...compiler.costs.hardware import Device
from ...compiler.costs.topology import Exchange, Topology
from ...compiler.host.caches import other_memory
from ...compiler.ir.program import ValueSpec
from ...compiler.ir.shards import Item, Parcel
from ..transport.mesh import Mesh
from ..transport.processes import Processes
from ..transport.replicas import SharedReplicas
from ..transport.transport import Transport, add_mean_
from .parcels import Outgoing
from .peers import host_name, machine

SIZES = (8, 4 << 10, 64 << 10, 512 << 10, 2 << 20, 8 << 20)  # bytes
REPEATS = 7
FRESH_BYTES = 32 << 20  # of gradients, so that those of each exchange are in no cache near by
TOGETHER = 4  # gradients in a parcel: a matrix or two, and vectors
OTHERS_BYTES = 8 << 20  # what a program touches between messages: caches near by are its
MEANWHILE_BYTES = 64 << 20  # what programs touch until a parcel's memory is needed again


def measured(
    spec: Device,
    mesh: Mesh,
    device: torch.device,
    transport: Transport,
    gather: Callable[[Any], list[Any]],
) -> Device:
    """The device on the links that there are: within a machine, and between machines if there are
    several; all ranks of a machine send to others at once, as far as these have as many.

    Args: as of `measure_link`.
    """
    if mesh.size == 1:
        return spec
    links = mesh, device, transport, gather
    hosts = hosts_of(gather)
    if len(set(hosts)) == 1:
        return linked(spec, *measure_link(*links))
    between = measure_link(*links, between_hosts(hosts))
    near = within_hosts(hosts)
    spec = linked(spec, *(measure_link(*links, near) if near else between))
    devices = max(map(hosts.count, hosts))
    own = Topology(devices, *between[:2], hosts=hosts)
    return spec.cluster.within(own) if spec.cluster is not None else replace(spec, topology=own)


def linked(spec: Device, bytes_per_s: float, latency_s: float, send_share: float) -> Device:
    """The device, or all of several kinds, on such a link."""
    return spec.each(lambda each: each.with_link(bytes_per_s, latency_s, send_share))


def hosts_of(gather: Callable[[Any], list[Any]]) -> tuple[int, ...]:
    """Per rank, the number of its machine. A collective."""
    told = gather((machine(), host_name()))
    order = list(dict.fromkeys(told))
    return tuple(map(order.index, told))


def within_hosts(hosts: Sequence[int]) -> dict[int, int]:
    """Rank -> another one of its machine, in pairs; some have none."""
    found: dict[int, int] = {}
    for host in sorted(set(hosts)):
        mine = [rank for rank, where in enumerate(hosts) if where == host]
        for a, b in zip(mine[::2], mine[1::2], strict=False):
            found |= {a: b, b: a}
    return found


def between_hosts(hosts: Sequence[int]) -> dict[int, int]:
    """Rank -> one of another machine, in pairs, as many at once as there are; some have none."""
    groups = [[r for r, where in enumerate(hosts) if where == h] for h in sorted(set(hosts))]
    found: dict[int, int] = {}
    for first, second in zip(groups[::2], groups[1::2], strict=False):
        for a, b in zip(first, second, strict=False):
            found |= {a: b, b: a}
    return found


def measure_link(
    mesh: Mesh,
    device: torch.device,
    transport: Transport,
    gather: Callable[[Any], list[Any]],
    peers: Mapping[int, int] | None = None,
) -> tuple[float, float, float]:
    """Bytes per second of one direction, seconds of latency, and the part of a message's seconds in
    which its sender does nothing else; the same on every rank.

    Ranks 0 and 1, 2 and 3, ... send messages to and fro, all pairs at once, in the way in which a
    step sends values: with other work between. Takes well under a second on loopback TCP. A
    collective: every rank calls it.

    Args:
        mesh: of two processes or more.
        device: where this rank's tensors are.
        transport: between processes, and not in use.
        gather: exchanges a value between all processes (`Agreement.gather`).
        peers: rank -> the other one of its pair, in another order of the ranks.
    """
    assert mesh.rank is not None
    assert mesh.size > 1, "one rank has no link"
    peer = mesh.rank ^ 1 if peers is None else peers.get(mesh.rank, mesh.size)
    gather(None)  # all start together
    mine: list[tuple[float, float]] = []
    if peer < mesh.size:
        mine = [_one_way_s(mesh.rank, peer, nbytes, device, transport) for nbytes in SIZES]
    found = [times for times in gather(mine) if times]
    whole_s, sends_s = (
        [median(times[i][k] for times in found) for i in range(len(SIZES))] for k in (0, 1)
    )
    return *fit(SIZES, whole_s), share_of(sends_s, whole_s)


def measure_exchange(
    transport: Processes, device: torch.device, gather: Callable[[Any], list[Any]]
) -> Exchange:
    """How fast the replicas of every stage exchange gradients, all at once, as a step does it: each
    packs a share for every other one, and adds up what arrives; the same on every rank. A
    collective of all ranks.

    Args: as of `measure_link`.
    """
    assert transport.dp > 1, "one replica exchanges nothing"
    gather(None)  # all start together
    elements = FRESH_BYTES // 4
    grads, totals = torch.ones(elements, device=device), torch.zeros(elements, device=device)
    parcels = [_parcel(nbytes, transport.dp) for nbytes in SIZES]
    found = gather([_exchanged_s(transport, parcel, grads, totals) for parcel in parcels])
    whole_s, busy_s = (
        [median(ranks[i][k] for ranks in found) for i in range(len(SIZES))] for k in (0, 1)
    )
    given = [4 * (sum(parcel.sizes) - parcel.sizes[0]) for parcel in parcels]
    return Exchange(*fit(given, whole_s), share_of(busy_s, whole_s))


def _parcel(nbytes: int, dp: int) -> Parcel:
    """Of about so many bytes, in as many gradients as such have in a step: each is packed, and
    added up, by itself."""
    elements = dp * max(1, nbytes // 4 // dp // TOGETHER)
    names = map(str, range(TOGETHER))
    return Parcel(tuple(Item(name, (elements,), torch.float32) for name in names), dp)


def share_of(busy_s: Sequence[float], whole_s: Sequence[float]) -> float:
    """The part of what messages of several sizes take that is the processor's: of all their seconds
    together, as a small one is nearly all waiting, and steps are made of large ones."""
    return min(math.fsum(busy_s) / math.fsum(whole_s), 1.0)


def _exchanged_s(
    transport: Processes, parcel: Parcel, grads: torch.Tensor, totals: torch.Tensor
) -> tuple[float, float]:
    """Median seconds of a parcel of gradients that leaves and is added up, and those of them in
    which its programs stand still.

    Through memory these are all: nobody else moves anything, and who is there first waits, as at
    every parcel of a step.

    Args:
        grads, totals: every time others of these are given and added to, as in a step.
    """
    dp, device, others = transport.dp, grads.device, other_memory(grads.device, MEANWHILE_BYTES)
    whole, (mine, *_) = parcel.items[0].shape[0], parcel.sizes
    now: list[torch.Tensor] = []

    def settle(item: Item, total: torch.Tensor) -> None:
        add_mean_(now[int(item.name)], total, dp, fresh=False)

    outgoing = Outgoing(transport, settle, lambda item: now[int(item.name)])
    seconds, busy_s = [], []
    for i in range(1 + REPEATS):
        at = i * sum(parcel.sizes) % (len(grads) - sum(parcel.sizes) + 1)
        now[:] = totals[at:][:mine].chunk(len(parcel.items))
        others.add_(1)
        start, busy = time.perf_counter(), time.process_time()
        for number in range(len(parcel.items)):
            outgoing.put(((parcel, number),), grads[at + number * whole :][:whole])
        outgoing.drain()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        busy_s.append(time.process_time() - busy)
    whole_s = median(seconds[1:])
    if device.type == "cuda":  # which has engines for it
        return whole_s, 0.0
    memory = isinstance(transport.replicas, SharedReplicas)
    return whole_s, whole_s if memory else median(busy_s[1:])


def _one_way_s(
    rank: int, peer: int, nbytes: int, device: torch.device, transport: Transport
) -> tuple[float, float]:
    """Half the median time of a message there and another back, and the median of what a send
    takes until it returns.

    The one that answers is there first: it has come from its own message, and the other from the
    receipt of that.
    """
    specs = [ValueSpec("probe", (nbytes,), (1,), torch.uint8)]
    probe = [torch.zeros(nbytes, dtype=torch.uint8, device=device)]
    others = other_memory(device, OTHERS_BYTES)
    seconds, sends = [], []
    for _ in range(1 + REPEATS):
        others.add_(1)
        start = time.perf_counter()
        for sender in (min(rank, peer), max(rank, peer)):
            if rank == sender:
                begun = time.perf_counter()
                transport.send(rank, peer, probe, specs)
                sends.append(time.perf_counter() - begun)
            else:
                transport.receive(peer, rank, specs, device).wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    transport.flush()
    return median(seconds[1:]) / 2, median(sends[1:])  # the first opens the connection


def measure_agreement(device: torch.device, gather: Callable[[Any], list[Any]]) -> float:
    """Seconds in which all ranks tell each other a small value, of the one that waits least; the
    same on every rank. A collective.

    Args: as of `measure_link`.
    """
    others, seconds = other_memory(device, OTHERS_BYTES), []
    for _ in range(1 + REPEATS):
        others.add_(1)
        start = time.perf_counter()
        gather((0, 1.0))
        seconds.append(time.perf_counter() - start)
    least: list[float] = [min(each) for each in zip(*gather(seconds[1:]), strict=True)]
    return median(least)


def fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(bytes per second, latency in seconds) with the least squared relative errors.

    Where noise leaves no such line with both above zero, the largest message gives the bandwidth
    and the quickest the latency.
    """
    weights = [1 / s**2 for s in seconds]
    total = sum(weights)
    mean_n = sum(w * n for w, n in zip(weights, sizes, strict=True)) / total
    mean_s = sum(w * s for w, s in zip(weights, seconds, strict=True)) / total
    points = list(zip(weights, sizes, seconds, strict=True))
    slope = sum(w * (n - mean_n) * (s - mean_s) for w, n, s in points)
    slope /= sum(w * (n - mean_n) ** 2 for w, n, _ in points)
    latency_s = mean_s - slope * mean_n
    if slope <= 0 or latency_s <= 0:
        return max(sizes) / seconds[-1], min(seconds)
    return 1 / slope, latency_s

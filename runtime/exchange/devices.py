"""Which device a rank computes on, who shares it, and what is planned for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...compiler.costs.at_hand import device_name, device_spec
from ...compiler.costs.cluster import cluster_of, parse_hardware
from ...compiler.costs.hardware import Device
from ...compiler.ir.errors import OptionError
from ...compiler.kept.cache import default_cache_dir
from ...compiler.options.options import CompileOptions
from ...compiler.planning.target import Target
from ...compiler.profiling.calibration import calibrated
from ..transport.mesh import Mesh
from ..transport.transport import Endpoint, Transport


def choose_device(wanted: str | torch.device | None, mesh: Mesh) -> torch.device:
    """The type of device to run on, with an index only where all ranks share it.

    A process of its own computes on the device of its rank from here on: what is made for "cuda"
    lies on the current one, also while models are traced.

    Raises:
        OptionError: a device that this machine does not have, or that has no runtime here.
    """
    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"device={wanted!r} is not a device: use 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device={wanted!r}: pipecompile runs on 'cpu' and 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device={wanted!r}, but this torch sees no CUDA device: use 'cpu'")
    if device.type == "cuda" and mesh.distributed:
        torch.cuda.set_device(device_of(mesh.local_ranks[0], device, mesh))
    return device


def device_of(rank: int, device: torch.device, mesh: Mesh) -> torch.device:
    """Where a rank computes: on CUDA, rank r of this machine takes device r mod count."""
    if device.type != "cuda" or device.index is not None:
        return device
    local = int(os.environ.get("LOCAL_RANK", rank)) if mesh.distributed else rank
    return torch.device("cuda", local % torch.cuda.device_count())


def endpoints(mesh: Mesh, device: torch.device, transport: Transport) -> dict[int, Endpoint]:
    """Of the ranks that this process plays.

    Args:
        device: the type of device; every rank's own is `device_of` it.
    """
    return {
        rank: Endpoint(rank, mesh, device_of(rank, device, mesh), transport)
        for rank in mesh.local_ranks
    }


def ranks_here(mesh: Mesh) -> int:
    """How many ranks run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", mesh.size)) if mesh.distributed else mesh.size


def ranks_per_device(device: torch.device, mesh: Mesh) -> int:
    """How many ranks of this machine share a device and its memory."""
    here = ranks_here(mesh)
    if device.type != "cuda" or device.index is not None:
        return here
    return -(-here // torch.cuda.device_count())


@dataclass(frozen=True)
class _Found:
    """The device of one rank.

    Attributes:
        name: what it calls itself.
        ranks: that share it.
    """

    spec: Device
    name: str
    ranks: int


def _found(options: CompileOptions, device: torch.device, mesh: Mesh) -> list[_Found]:
    """Those of the ranks that this process plays."""
    made: dict[torch.device, _Found] = {}
    devices = [device_of(rank, device, mesh) for rank in mesh.local_ranks]
    for each in set(devices):
        spec = device_spec(each)
        if options.costs == "calibrated":
            spec = calibrated(spec, default_cache_dir(), options.fuses)
        made[each] = _Found(spec, device_name(each), ranks_per_device(device, mesh))
    return [made[each] for each in devices]


def _at_hand(found: Sequence[_Found]) -> tuple[Device, int]:
    """The device of all ranks, or of several kinds those of each, and the memory that every one of
    them has."""
    names = {each.spec.name: each.name for each in found}
    if len({(each.spec.name, each.name) for each in found}) == 1:
        whole, own = (min(sizes) for sizes in zip(*map(_sizes, found), strict=True))
        return replace(found[0].spec, memory_bytes=whole), own
    specs = []
    for each in found:
        alike = all(names[o.spec.name] == o.name for o in found if o.spec.name == each.spec.name)
        spec = each.spec if alike else each.spec.changed([each.name])
        specs.append(replace(spec, memory_bytes=_sizes(each)[1]))
    cluster = cluster_of(specs)
    return cluster, cluster.memory_bytes


def _sizes(found: _Found) -> tuple[int, int]:
    """Bytes of a device, and of a rank's share of it."""
    return found.spec.memory_bytes, found.spec.memory_bytes // found.ranks


def target_of(
    options: CompileOptions,
    device: torch.device,
    mesh: Mesh,
    gather: Callable[[Any], list[Any]],
) -> Target:
    """The devices at hand, shared among the ranks on them, or those of ``hardware=``, one per rank.
    A collective of processes.

    Args:
        gather: exchanges a value between all processes (`Agreement.gather`).
    """
    whole = not options.memory_bytes
    if options.hardware is None:
        found = [each for ranks in gather(_found(options, device, mesh)) for each in ranks]
        spec, own_bytes = _at_hand(found)
        return Target(device, spec, options.memory_bytes or own_bytes, whole=whole)
    spec = parse_hardware(options.hardware)
    if spec.cluster is not None and mesh.distributed:  # ranks are where they are
        spec = spec.cluster.as_they_are()
    if options.costs == "calibrated":
        spec = spec.each(lambda each: calibrated(each, default_cache_dir(), options.fuses))
    return Target(device, spec, options.memory_bytes or spec.memory_bytes, whole=whole)

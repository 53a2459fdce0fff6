"""Which device a rank computes on, who shares it, and what is planned for."""

from __future__ import annotations

import os

import torch

from ...compiler.costs.at_hand import device_spec
from ...compiler.costs.cluster import parse_hardware
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


def target_of(options: CompileOptions, device: torch.device, mesh: Mesh) -> Target:
    """The device at hand, shared among the ranks on it, or that of ``hardware=``, one per rank."""
    if options.hardware is None:
        spec = device_spec(device_of(mesh.local_ranks[0], device, mesh))
        own_bytes = spec.memory_bytes // ranks_per_device(device, mesh)
    else:
        spec = parse_hardware(options.hardware)
        own_bytes = spec.memory_bytes
        if spec.cluster is not None and mesh.distributed:  # ranks are where they are
            spec = spec.cluster.as_they_are()
    if options.costs == "calibrated":
        spec = spec.each(lambda each: calibrated(each, default_cache_dir(), options.fuses))
    budget = options.memory_bytes or own_bytes
    return Target(device, spec, budget, whole=not options.memory_bytes)

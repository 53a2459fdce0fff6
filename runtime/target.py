"""What a run is planned for: whose rates, and how much memory a rank may use."""

from __future__ import annotations

import torch

from ..compiler.costs.hardware import device_spec, parse_device
from ..compiler.options.options import CompileOptions
from ..compiler.planning.target import Target
from .exchange.mesh import Mesh, device_of, ranks_per_device


def target_of(options: CompileOptions, device: torch.device, mesh: Mesh) -> Target:
    """The device at hand, shared among the ranks on it, or that of ``hardware=``, one per rank."""
    if options.hardware is None:
        spec = device_spec(device_of(mesh.local_ranks[0], device, mesh))
        own_bytes = spec.memory_bytes // ranks_per_device(device, mesh)
    else:
        spec = parse_device(options.hardware)
        own_bytes = spec.memory_bytes
    return Target(device, spec, options.memory_bytes or own_bytes)

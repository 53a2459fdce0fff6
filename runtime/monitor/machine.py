"""What the ranks of a run compute on, as far as metrics ask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...compiler.costs.hardware import DEVICES, Device
from ...compiler.costs.topology import Numbering
from ...compiler.ir.precision import computed_in
from ...compiler.options.options import CompileOptions
from ..exchange.devices import ranks_per_device
from ..transport.mesh import Mesh


@dataclass(frozen=True)
class Machine:
    """What the ranks compute on.

    Attributes:
        device: of this process's first rank.
        ranks: of the replicas, where each is a process of its own; else None.
        devices, peak_flops_per_s: as `Metrics` has them.
    """

    device: torch.device
    ranks: Numbering | None
    devices: int
    peak_flops_per_s: float | None


def machine_of(
    mesh: Mesh, device: torch.device, spec: Device, options: CompileOptions, module: nn.Module
) -> Machine:
    """Of a pipeline.

    Args:
        device: of this process's first rank.
        spec: that was planned for.
        module: whose parameters tell in which dtype is computed, where no ``precision=`` does.
    """
    here = torch.device(device.type) if device.index is not None else device
    shared = device.type == "cuda" or not mesh.distributed
    devices = -(-mesh.size // ranks_per_device(here, mesh)) if shared else mesh.size
    # what a data sheet says, or the user: other GPUs, and CPUs, have careful figures
    members = spec.cluster.members if spec.cluster is not None else (spec,)
    listed = all(each.name in DEVICES for each in members)
    known = options.hardware is not None or (device.type == "cuda" and listed)
    peak = spec.mean_peak(computed_in(options.dtypes, module)) if known else None
    return Machine(device, mesh.numbering if mesh.distributed else None, devices, peak)

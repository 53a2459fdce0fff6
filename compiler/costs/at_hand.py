"""The device at hand: its specification, from what it says of itself.

Needs no torch to be imported, as `hardware` does not.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .hardware import A100, A100_40GB, CPU, GIGA, H100, H200, L4, Device
from .reserved import CARD, HOPPER

if TYPE_CHECKING:
    import torch

# Words of the name that CUDA reports. The figures are those of SXM modules: other boards of the
# same chip, and slices of one, are made from their properties.
_WORDS = (
    ({"H200"}, H200),
    ({"H100", "HBM3"}, H100),
    ({"A100", "SXM4", "80GB"}, A100),
    ({"A100", "SXM4", "40GB"}, A100_40GB),
    ({"L4"}, L4),
)
_OTHER_BOARDS = {"PCIE", "NVL", "MIG"}


def device_spec(device: torch.device) -> Device:
    """The specification of a torch device of this machine, with the memory that it really has.

    A GPU without a data sheet here gets careful figures made from its properties; float32 is TF32
    where `torch.set_float32_matmul_precision` allows it.
    """
    if device.type != "cuda":
        return replace(CPU, memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    import torch

    spec = gpu_spec(torch.cuda.get_device_properties(device))
    fast = torch.get_float32_matmul_precision() != "highest"
    return spec.with_tf32() if fast else spec


def gpu_spec(properties: Any) -> Device:
    """The specification of a GPU.

    Args:
        properties: what `torch.cuda.get_device_properties` returns.
    """
    words = set(re.findall(r"[A-Z0-9]+", properties.name.upper()))
    for wanted, spec in _WORDS:
        if wanted <= words and not words & _OTHER_BOARDS:
            return replace(spec, memory_bytes=properties.total_memory)
    # What every NVIDIA GPU since Volta has at least, per multiprocessor and cycle: 64 FMAs in
    # float32 and 8 times as many in 16 bits (V100 white paper).
    cycles_per_s = 1e3 * getattr(properties, "clock_rate", 1_200_000)
    float32 = properties.multi_processor_count * 64 * 2 * cycles_per_s
    half = {"float16": 8 * float32} | ({"bfloat16": 8 * float32} if properties.major >= 8 else {})
    transfers_per_s = 2 * 1e3 * getattr(properties, "memory_clock_rate", 0)  # double data rate
    memory = transfers_per_s * getattr(properties, "memory_bus_width", 0) / 8
    newest = properties.major >= 9
    return Device(
        properties.name,
        {"float64": float32 / 64, "float32": float32, **half},
        bytes_per_s=memory or 300 * GIGA,
        memory_bytes=properties.total_memory,
        link_bytes_per_s=12 * GIGA,  # what PCIe Gen3 x16 carries in one direction
        link_latency_s=20e-6,
        launch_s=4e-6,
        reserved=HOPPER if newest else CARD,
    )


def device_name(device: torch.device) -> str:
    """What the device at hand calls itself: times measured on one hold for others of that name."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()

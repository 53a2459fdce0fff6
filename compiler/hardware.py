"""Device specifications for the roofline: what a node would take at the device's peak."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Peak rates of one device and of the link to its neighbour.

    Attributes:
        flops_per_s: dense matrix products in fp32.
        bytes_per_s: memory bandwidth.
        link_bytes_per_s: bandwidth of one direction to the next stage.
        launch_s: what one operator costs however small it is.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    link_bytes_per_s: float
    launch_s: float


# One core of a current server: 2 AVX-512 FMA units at about 2 GHz reach 128 GFLOP/s on paper, and
# BLAS about 60 % of it. Memory and link (loopback TCP) are what one core can move.
CPU = Device("cpu", 80e9, 10e9, 2e9, 3e-6)

# NVIDIA H100 SXM data sheet: 67 TFLOP/s fp32, 3.35 TB/s HBM3, NVLink 900 GB/s both directions.
H100 = Device("h100", 67e12, 3.35e12, 450e9, 4e-6)


def device_spec(device: torch.device) -> Device:
    """The specification used for a torch device."""
    return H100 if device.type == "cuda" else CPU

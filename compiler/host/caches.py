"""Memory beside what is timed."""

from __future__ import annotations

import torch


def other_memory(device: torch.device, nbytes: int) -> torch.Tensor:
    """So many bytes: who goes through them leaves nothing of what is timed in the caches near by.
    None for a GPU, whose programs leave the host's caches alone."""
    return torch.zeros(nbytes if device.type == "cpu" else 0, dtype=torch.uint8)

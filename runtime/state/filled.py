"""Small tensors that are made where they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def numbers_on(
    device: torch.device, numbers: Sequence[float], dtype: torch.dtype
) -> list[torch.Tensor]:
    """0-dim tensors with these numbers; on CUDA without waiting for the device.

    `torch.tensor` would write them to the host's memory and copy that, which waits for all that is
    queued; to fill is to queue one more kernel. Equal numbers share a tensor, which nobody may
    write to.
    """
    made = {number: torch.full((), number, dtype=dtype, device=device) for number in set(numbers)}
    return [made[number] for number in numbers]

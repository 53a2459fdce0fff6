"""Where the values of one tensor go: all of them, or only the rows that this process keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ...compiler.tensors.facts import digest, sample

Cut = Callable[[torch.Tensor], torch.Tensor]
"""A view of the rows that are kept of a tensor."""


class Allocation:
    """Memory of one tensor, empty at first.

    Args:
        like: the whole tensor's shape, strides and dtype, on the meta device.
        devices: where it is wanted.
        cut: what is kept of it; None for all.

    Attributes:
        held: device -> what is kept there.
        digest: a hash of the whole tensor, "" before it was taken: ranks that keep other rows of
            it compare this.
    """

    def __init__(self, like: torch.Tensor, devices: Iterable[torch.device], cut: Cut | None = None):
        self.like, self._cut = like, cut
        kept = like if cut is None else cut(like)
        if kept.shape != like.shape:
            kept = kept.contiguous()
        self.held = {device: torch.empty_like(kept, device=device) for device in devices}
        self.digest = ""

    @property
    def whole(self) -> bool:
        """Whether all of the tensor is kept."""
        return self._cut is None

    def room(self) -> torch.Tensor:
        """Memory for the whole tensor: its own, or where that has rows only, new one."""
        device, held = next(iter(self.held.items()))
        return held if self.whole else torch.empty_like(self.like, device=device)

    def take(self, values: torch.Tensor) -> None:
        """Keep what is wanted of the whole tensor, which may have another dtype and device."""
        kept = values if self._cut is None else self._cut(values)
        for held in self.held.values():
            if held is not kept:
                held.copy_(kept)
        self.digest = digest(sample(values).to(self.like.dtype))

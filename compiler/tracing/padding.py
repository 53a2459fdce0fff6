"""What `nn.TransformerEncoder` returns for padding in evaluation, traced as it is untraced.

Told of padding, it computes with nested tensors there, and returns zeros where there are none. It
cannot be traced so, and when it is traced it takes the path of training, which returns something
else at those places.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def padded_outputs() -> Iterator[None]:
    """While torch.export traces: the path of training, and zeros afterwards."""
    forward = nn.TransformerEncoder.forward
    here = threading.get_ident()

    def kept(
        self: nn.TransformerEncoder,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        given = src, mask, src_key_padding_mask, is_causal
        padding = src_key_padding_mask
        if threading.get_ident() != here or padding is None or not _nests(self, src, mask):
            return forward(self, *given)
        norm, self.norm, self.use_nested_tensor = self.norm, None, False
        try:
            output = _zeroed(forward(self, *given), padding.logical_not(), self.mask_check)
        finally:
            self.norm, self.use_nested_tensor = norm, True
        return output if norm is None else norm(output)

    nn.TransformerEncoder.forward = kept  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.TransformerEncoder.forward = forward  # type: ignore[method-assign]


def _nests(encoder: nn.TransformerEncoder, src: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether untraced it would compute with nested tensors, if padding comes last."""
    first = encoder.layers[0]
    trains = torch.is_grad_enabled() and any(
        each.requires_grad for each in (src, *first.parameters())
    )
    return (
        torch.backends.mha.get_fastpath_enabled()
        and encoder.use_nested_tensor
        and not (first.training or trains or torch.is_autocast_enabled())
        and src.dim() == 3
        and mask is None
    )


def _zeroed(output: torch.Tensor, kept: torch.Tensor, checks: bool) -> torch.Tensor:
    """Zeros where nothing is kept; where ``checks``, only if that comes last in every row."""
    zeroed = output.masked_fill(kept.logical_not().unsqueeze(-1), 0.0)
    if not checks:
        return zeroed
    return torch.where((kept[:, 1:] <= kept[:, :-1]).all(), zeroed, output)

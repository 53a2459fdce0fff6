"""The kernels by which a CUDA device runs attention, in a graph that is traced on a CPU to plan.

A CPU has other kernels: none that is fused has dropout, so that all probabilities would be kept
where a GPU keeps a number per row. Which one CUDA takes, and what it keeps, is known without a
device: torch tries FlashAttention, then memory-efficient attention, then plain operators, by the
conditions below (ATen's native/transformers/cuda/sdp_utils.cpp, for compute capability 8.0 and
later). What comes out is planned and not run.

cuDNN's kernels, which newer versions of torch prefer on some devices, keep the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.nn.functional import pad

_ATEN = torch.ops.aten
_ATTENTION = _ATEN.scaled_dot_product_attention.default
_HALVES = (torch.float16, torch.bfloat16)
_FLASH_DIM = 256  # the largest head
_FLASH_STEP = 8  # heads are padded to multiples of it
_MASK_STEP = 16  # rows of a mask are stored in multiples of it
_ALIGNED_BYTES = 16  # of a head, which tensor cores load at once


def choose_kernels(module: fx.GraphModule) -> str:
    """Attention calls the kernel that CUDA would, once shapes and dtypes are known."""
    parts = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    for part in parts:
        found = part.graph.find_nodes(op="call_function", target=_ATTENTION)
        for node in found:
            node.target = attention
        if found:
            part.recompile()
    return ""


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, by the operators that CUDA runs."""
    tensors = query, key, value
    call = _Call(*tensors, attn_mask is not None, is_causal, enable_gqa)
    if call.fits_flash:
        return _flash(*tensors, dropout_p, is_causal, scale)
    if call.fits_efficient:
        return _efficient(*tensors, attn_mask, dropout_p, is_causal, scale)
    math: Callable[..., Any] = _ATEN._scaled_dot_product_attention_math.default
    options = {"scale": scale, "enable_gqa": enable_gqa}
    return cast(torch.Tensor, math(*tensors, attn_mask, dropout_p, is_causal, **options)[0])


@dataclass(frozen=True, eq=False)
class _Call:
    """What a kernel is chosen by."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    masks: bool
    causal: bool
    grouped: bool

    @property
    def _are_heads(self) -> bool:
        """(rows, heads, tokens, width), some of each, of one dtype."""
        each = self.query, self.key, self.value
        return self.query.dim() == 4 and len({(t.dim(), t.dtype, t.shape[0]) for t in each}) == 1

    @property
    def fits_flash(self) -> bool:
        query, key, value = self.query, self.key, self.value
        if self.masks or query.dtype not in _HALVES or not self._are_heads:
            return False
        heads, width = query.shape[1], query.shape[-1]
        if self.grouped:
            fits = key.shape[1] == value.shape[1] and heads % key.shape[1] == 0
        else:
            fits = key.shape[1] == value.shape[1] == heads
        same = key.shape[-1] == value.shape[-1] == width <= _FLASH_DIM
        return fits and same and (not self.causal or query.shape[-2] == key.shape[-2])

    @property
    def fits_efficient(self) -> bool:
        query, key, value = self.query, self.key, self.value
        if query.dtype not in (*_HALVES, torch.float32) or not self._are_heads:
            return False
        if not key.shape[1] == value.shape[1] == query.shape[1] or (self.causal and self.masks):
            return False
        step = _ALIGNED_BYTES // query.dtype.itemsize
        aligned = query.shape[-1] % step == 0 and value.shape[-1] % step == 0
        return aligned and key.shape[-1] == query.shape[-1]


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale  # of heads as they were
    if more := -width % _FLASH_STEP:
        query, key, value = (pad(each, (0, more)) for each in (query, key, value))
    kernel: Callable[..., Any] = _ATEN._scaled_dot_product_flash_attention.default
    found = kernel(query, key, value, dropout_p, causal, False, scale=scale)[0]
    return cast(torch.Tensor, found[..., :width] if more else found)


def _efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    bias = None if mask is None else _bias(mask, query, key)
    kernel: Callable[..., Any] = _ATEN._scaled_dot_product_efficient_attention.default
    found = kernel(query, key, value, bias, keeps, dropout_p, causal, scale=scale)[0]
    return cast(torch.Tensor, found)


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What is added to the scores, for each head, in rows that are aligned."""
    if mask.dtype is torch.bool:
        zeros = torch.zeros_like(mask, dtype=query.dtype)
        mask = zeros.masked_fill(mask.logical_not(), -torch.inf)
    tokens = mask.shape[-1]
    if more := -tokens % _MASK_STEP:
        mask = pad(mask, (0, more))[..., :tokens]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])

"""FLOPs of attention kernels (`formulas.py` says what counts)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

T = torch.Tensor
Formula = Callable[..., int]


@cache
def _pairs(queries: int, keys: int, left: int | None, right: int | None, shift: int) -> int:
    """Pairs of a query and a key that it sees.

    Args:
        left, right: how many keys before and behind its own a query sees; None: all.
        shift: of the own key; the own key of query i is i + shift.
    """
    if left is None and right is None:
        return queries * keys
    seen = 0
    for own in range(shift, shift + queries):
        first = 0 if left is None else max(0, own - left)
        last = keys - 1 if right is None else min(keys - 1, own + right)
        seen += max(0, last - first + 1)
    return seen


def _forward(pairs: int, query: T, value: T) -> int:
    """Scores and their products with the values; ``pairs`` of all heads."""
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def _backward(pairs: int, query: T, value: T) -> int:
    """Scores anew, gradients of queries and keys; gradients of scores and of values."""
    return 2 * pairs * (3 * query.shape[-1] + 2 * value.shape[-1])


def _attention(count: Callable[[int, T, T], int]) -> Formula:
    """(batch, heads, tokens, width), keys and values of as many heads or of groups of them."""

    def formula(query: T, key: T, value: T, is_causal: bool = False, **_: Any) -> int:
        batch, heads, queries = query.shape[:3]
        seen = _pairs(queries, key.shape[-2], None, 0 if is_causal else None, 0)
        return count(batch * heads * seen, query, value)

    return formula


def _in_full(query: T, key: T, value: T, **_: Any) -> int:
    """Two products and a softmax."""
    return _forward(math.prod(query.shape[:-1]) * key.shape[-2], query, value)


def _flash(count: Callable[[int, T, T], int]) -> Formula:
    """(batch, tokens, heads, width), or (tokens of all rows, heads, width) where rows have lengths
    of their own, which are taken for the longest. The last query sees the last key."""

    def formula(
        query: T,
        key: T,
        value: T,
        cum_seq_q: T | None,
        max_q: int,
        max_k: int,
        is_causal: bool = False,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        **_: Any,
    ) -> int:
        left, right = (
            None if each is None or each < 0 else int(each)
            for each in (window_size_left, window_size_right)
        )
        right = 0 if is_causal else right
        heads = query.shape[-2]
        if cum_seq_q is None:
            rows, queries, keys = query.shape[0], query.shape[1], key.shape[1]
        else:
            rows, queries, keys = cum_seq_q.shape[0] - 1, int(max_q), int(max_k)
        seen = rows * _pairs(queries, keys, left, right, keys - queries)
        if cum_seq_q is not None:  # no more than there are queries
            seen = min(seen, query.shape[0] * keys)
        return count(heads * seen, query, value)

    return formula


def _efficient(count: Callable[[int, T, T], int]) -> Formula:
    """(batch, tokens, heads, width); causal from the first key (1) or to the last one (2)."""

    def formula(
        query: T,
        key: T,
        value: T,
        cu_seqlens_q: T | None,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
        custom_mask_type: int = 0,
        window_size: int | None = None,
        **_: Any,
    ) -> int:
        rows, queries, heads = query.shape[:3]
        keys = key.shape[1]
        if cu_seqlens_q is not None and max_seqlen_q is not None and max_seqlen_k is not None:
            rows, queries, keys = cu_seqlens_q.shape[0] - 1, int(max_seqlen_q), int(max_seqlen_k)
        left = window_size - 1 if window_size else None
        right = 0 if custom_mask_type else None
        shift = keys - queries if custom_mask_type == 2 else 0
        return count(rows * heads * _pairs(queries, keys, left, right, shift), query, value)

    return formula


def _with_projections(
    qkv_weight: T,
    proj_weight: T,
    query: T | None = None,
    key: T | None = None,
    src: T | None = None,
    **_: Any,
) -> int:
    """With its projections, as `nn.MultiheadAttention` evaluates: (batch, tokens, width)."""
    x = src if query is None else query
    assert x is not None
    keys = (x if key is None else key).shape[1]
    projected = 2 * (x.numel() // x.shape[-1]) * (qkv_weight.numel() + proj_weight.numel())
    return projected + 4 * x.numel() * keys


def _encoder_layer(src: T, ffn_weight_1: T, ffn_weight_2: T, **given: Any) -> int:
    tokens = src.numel() // src.shape[-1]
    mlp = 2 * tokens * (ffn_weight_1.numel() + ffn_weight_2.numel())
    return mlp + _with_projections(src=src, **given)


FORMULAS: Mapping[str, Formula] = {
    "_scaled_dot_product_flash_attention": _attention(_forward),
    "_scaled_dot_product_flash_attention_backward": _attention(_backward),
    "_scaled_dot_product_flash_attention_for_cpu": _attention(_forward),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention(_backward),
    "_scaled_dot_product_efficient_attention": _attention(_forward),
    "_scaled_dot_product_efficient_attention_backward": _attention(_backward),
    "_scaled_dot_product_cudnn_attention": _attention(_forward),
    "_scaled_dot_product_cudnn_attention_backward": _attention(_backward),
    "_scaled_dot_product_fused_attention_overrideable": _attention(_forward),
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention(_backward),
    "_scaled_dot_product_attention_math": _in_full,
    "_flash_attention_forward": _flash(_forward),
    "_flash_attention_backward": _flash(_backward),
    "_efficient_attention_forward": _efficient(_forward),
    "_efficient_attention_backward": _efficient(_backward),
    "_native_multi_head_attention": _with_projections,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}
"""Of ATen's operators."""

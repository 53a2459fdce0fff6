"""Operators -> the shapes that tell how much of its peak a kernel reaches.

By the schema's name, with operands by their names in the schema, as formulas of FLOPs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .forms import Attention, Form, Product

T = torch.Tensor
Shape = Callable[..., Form]


def form_of(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Form | None:
    """The shape of one call's products; None where it is not known."""
    schema: Any = getattr(op, "_schema", None)
    shape = None if schema is None else _SHAPES.get(schema.name.rstrip("_"))
    if shape is None:
        return None
    named = {a.name: a.default_value for a in schema.arguments}
    named |= dict(zip((a.name for a in schema.arguments), args, strict=False))
    return shape(**named | dict(kwargs))


def _product(left: T, right: T) -> Product:
    """(..., m, k) × (..., k, n); a vector is one column."""
    n = right.shape[-1] if right.dim() > 1 else 1
    if right.dim() < 3:  # all rows go through one matrix
        return Product(1, math.prod(left.shape[:-1]), n, left.shape[-1])
    return Product(math.prod(left.shape[:-2]), left.shape[-2], n, left.shape[-1])


def _pair(left: str, right: str) -> Shape:
    return lambda **given: _product(given[left], given[right])


def _linear(input: T, weight: T, **_: Any) -> Product:
    return Product(1, math.prod(input.shape[:-1]), weight.shape[0], input.shape[-1])


def _heads(backward: bool) -> Shape:
    """(batch, heads, tokens, width)."""

    def shape(query: T, key: T, **_: Any) -> Attention:
        heads, tokens = math.prod(query.shape[:-2]), query.shape[-2]
        return Attention(heads, tokens, key.shape[-2], query.shape[-1], backward)

    return shape


def _tokens(backward: bool) -> Shape:
    """(batch, tokens, heads, width); (tokens of all rows, heads, width) of rows of any lengths."""

    def shape(query: T, key: T, **given: Any) -> Attention:
        heads, width = query.shape[-2:]
        if query.dim() == 3:
            queries, keys = int(given["max_q"]), int(given["max_k"])
            rows = -(-query.shape[0] // max(1, queries))
        else:
            rows, queries, keys = query.shape[0], query.shape[1], key.shape[1]
        return Attention(rows * heads, queries, keys, width, backward)

    return shape


_KERNELS = (
    "flash_attention",
    "flash_attention_for_cpu",
    "efficient_attention",
    "cudnn_attention",
    "fused_attention_overrideable",
)
_ATEN: dict[str, Shape] = {
    **dict.fromkeys(("mm", "bmm", "_int_mm", "_scaled_mm"), _pair("self", "mat2")),
    **dict.fromkeys(("addmm", "_addmm_activation"), _pair("mat1", "mat2")),
    **dict.fromkeys(("baddbmm", "addbmm"), _pair("batch1", "batch2")),
    "linear": _linear,
    **{f"_scaled_dot_product_{kind}": _heads(backward=False) for kind in _KERNELS},
    **{f"_scaled_dot_product_{kind}_backward": _heads(backward=True) for kind in _KERNELS},
    "_flash_attention_forward": _tokens(backward=False),
    "_flash_attention_backward": _tokens(backward=True),
}
_SHAPES: Mapping[str, Shape] = {f"aten::{name}": shape for name, shape in _ATEN.items()}

"""Attention as transformers runs it when nobody traces it.

Told that it is traced, transformers does not look at its masks. It then builds a causal mask of
(batch, 1, seq, seq) where it would set a flag, builds a mask of nothing but ones where it would
pass none, and repeats key and value heads where it would leave grouping to the kernel. Here the
mask can be looked at, if it is a constant: what untraced code would have done is restored.
Kernels then skip the masked half, nobody keeps masks or repeated heads, and gradients get the
bits of the untraced model (the grouped kernel adds up in another order than the repeated one).

Works on the exported forward graph, before differentiation picks kernels. Attention that was not
called by transformers stays as its author wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import cast

import torch
from torch import fx

from ...compiler.ir.graph import computed, is_getitem, is_operator, is_random, made_of

_ATEN = torch.ops.aten
_ATTENTION = _ATEN.scaled_dot_product_attention.default
_CALLER = "attention_interface("  # how models of transformers call attention
MAX_ELEMENTS = 1 << 26  # a mask of 8192 × 8192: what is worth computing to look at
MAX_GROUPED_DIM = 256  # transformers' own limit for leaving grouped heads to the kernel


class _Mask(Enum):
    CAUSAL = "causal"
    ALL = "all"
    OTHER = "other"


def restore_attention(module: fx.GraphModule, leaves: Sequence[torch.Tensor] = ()) -> str:
    """Rewrite the attention calls whose mask is a constant; returns a note."""
    del leaves  # shapes are in the graph
    if module.meta.get("as_untraced"):
        return ""  # masks are there because the model wants them
    kinds: dict[fx.Node, _Mask] = {}
    changed = 0
    for node in module.graph.find_nodes(op="call_function", target=_ATTENTION):
        mask = _argument(node, 3, "attn_mask")
        source = str(node.meta.get("stack_trace", "")).strip().splitlines()
        if not isinstance(mask, fx.Node) or not source or _CALLER not in source[-1]:
            continue
        if mask not in kinds:
            kinds[mask] = _kind(module, mask)
        if kinds[mask] is not _Mask.OTHER:
            _unmask(node, kinds[mask] is _Mask.CAUSAL)
            changed += 1
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return f"{changed} constant attention masks dropped" if changed else ""


def _argument(node: fx.Node, position: int, name: str) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _unmask(node: fx.Node, causal: bool) -> None:
    """Without a mask, and with key and value heads as they were before they were repeated."""
    query, key, value = cast(list[fx.Node], node.args[:3])
    kwargs = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}
    plain_key, plain_value = _unrepeated(key), _unrepeated(value)
    if plain_key is not None and plain_value is not None:
        dims = {n.meta["val"].shape[-1] for n in (plain_key, plain_value)}
        if len(dims) == 1 and max(dims) <= MAX_GROUPED_DIM:
            key, value = plain_key, plain_value
            kwargs["enable_gqa"] = True
    dropout = cast(float, _argument(node, 4, "dropout_p") or 0.0)
    node.args = (query, key, value, None, dropout, causal)
    node.kwargs = kwargs


def _unrepeated(node: fx.Node) -> fx.Node | None:
    """x of ``x[:, :, None].expand(b, heads, n, s, d).reshape(b, heads * n, s, d)``."""
    chain = []
    for target in (_ATEN.reshape.default, _ATEN.expand.default, _ATEN.unsqueeze.default):
        if node.target is not target:
            return None
        chain.append(node)
        node = cast(fx.Node, node.args[0])
    reshape, expand, unsqueeze = chain
    batch, heads, *rest = node.meta["val"].shape
    repeats = expand.meta["val"].shape[2]
    grouped = list(reshape.meta["val"].shape) == [batch, heads * repeats, *rest]
    return node if grouped and unsqueeze.args[1] == 2 else None


def _kind(module: fx.GraphModule, mask: fx.Node) -> _Mask:
    fake = mask.meta.get("val")
    if not isinstance(fake, torch.Tensor) or fake.dim() < 2 or fake.numel() > MAX_ELEMENTS:
        return _Mask.OTHER
    value = _constant_value(mask)
    if value is None or not (value.dtype is torch.bool or value.is_floating_point()):
        return _Mask.OTHER
    seen = value if value.dtype is torch.bool else value == 0
    if value.is_floating_point() and bool((value[~seen] > torch.finfo(value.dtype).min).any()):
        return _Mask.OTHER
    if bool(seen.all()):
        return _Mask.ALL
    rows, columns = value.shape[-2:]
    causal = torch.ones(rows, columns, dtype=torch.bool).tril().expand(value.shape)
    return _Mask.CAUSAL if rows == columns and torch.equal(seen, causal) else _Mask.OTHER


def _constant_value(wanted: fx.Node) -> torch.Tensor | None:
    """The value of a node that depends on literals alone, computed on the CPU; else None."""
    nodes = made_of(
        wanted, lambda node: (is_operator(node) or is_getitem(node)) and not is_random(node)
    )
    if nodes is None:
        return None
    value = computed(nodes, {})[wanted]
    return value if isinstance(value, torch.Tensor) else None

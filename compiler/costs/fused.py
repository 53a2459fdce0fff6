"""Bytes that element-wise operators and reductions move where a backend fuses them.

A kernel that was fused reads what comes from outside once and writes what others read; what its
operators pass on stays in registers. Fusions do not reach over the borders of layers' modules
(`passes.programs.fusions`), nor over matrix products, which are kernels of a library.
"""

from __future__ import annotations

import torch
from torch import fx

from ...passes.programs.fusions import layer_of
from ..ir.graph import is_getitem, nbytes, phase_of, storage_root

_DECOMPOSED = (
    "native_layer_norm",
    "_fused_rms_norm",
    "_softmax",
    "_log_softmax",
    "gelu",
    "silu",
    "_to_copy",
    "native_dropout",
)
"""What Inductor makes element-wise operators and reductions of; their backwards too."""
_TAGS = {torch.Tag.pointwise, torch.Tag.reduction}


def is_fusable(node: fx.Node) -> bool:
    """Whether an operator becomes a part of a fusion."""
    if node.op != "call_function" or is_getitem(node) or storage_root(node) is not node:
        return False
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return False
    name = str(packet).removeprefix("aten.")
    return bool(_TAGS & set(node.target.tags)) or name.startswith(_DECOMPOSED)  # type: ignore[union-attr]


def fused_bytes(node: fx.Node) -> tuple[int, int]:
    """(read from outside, written for others) by a node that `is_fusable`."""
    read = 0
    for source in node.all_input_nodes:
        root = _maker(source)
        if not (is_fusable(root) and _together(root, node)):
            read += nbytes(source)
    leaves = any(not (is_fusable(u) and _together(node, u)) for u in _readers(node))
    return read, nbytes(node) if leaves or not node.users else 0


def _maker(node: fx.Node) -> fx.Node:
    """The operator in whose result a value lies."""
    root = storage_root(node)
    while is_getitem(root):
        root = root.all_input_nodes[0]
    return root


def _readers(node: fx.Node) -> list[fx.Node]:
    """Operators that read a result, or an item or a view of it."""
    found: list[fx.Node] = []
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if is_getitem(user) or (user.op == "call_function" and storage_root(user) is not user):
            pending += user.users
        else:
            found.append(user)
    return found


def _together(a: fx.Node, b: fx.Node) -> bool:
    return layer_of(a) == layer_of(b) and phase_of(a) is phase_of(b)

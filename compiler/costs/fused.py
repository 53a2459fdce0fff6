"""Bytes that element-wise operators and reductions move where a backend fuses them.

A kernel that was fused reads what comes from outside once and writes what others read; what its
operators pass on stays in registers. Fusions do not reach over the borders of layers' modules
(`passes.programs.fusions`), nor over matrix products, which are kernels of a library.
"""

from __future__ import annotations

from torch import fx

from ...passes.programs.fusions import is_fusable, layer_of
from ..ir.graph import is_getitem, nbytes, phase_of, storage_root


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

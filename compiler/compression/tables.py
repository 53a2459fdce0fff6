"""Tables of embeddings: parameters of which a forward reads rows by their numbers, and no more.

So a microbatch's gradient has numbers in the rows that it has looked up, and zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from ..ir.graph import JointGraph, Phase, module_of, phase_of

aten = torch.ops.aten

_INDICES = {
    aten.embedding.default: 1,
    aten._embedding_bag.default: 1,
    aten._embedding_bag_forward_only.default: 1,
}
"""Operator -> the operand with the numbers of the rows that it reads of its first one."""


def lookups_of(graph: JointGraph, trained: Collection[str]) -> dict[str, int]:
    """FQN -> how many rows a microbatch looks up, of the tables.

    Args:
        trained: FQNs of the parameters that may be some.
    """
    found: dict[str, int] = {}
    for name in trained:
        counts = [_looked_up(node, table) for node, table in _readers(graph, name)]
        known = [count for count in counts if count is not None]
        if known and len(known) == len(counts):
            found[name] = sum(known)
    return found


def why_none(graph: JointGraph, trained: Collection[str]) -> str:
    """What else reads the parameters that are looked up in; "" where there are none."""
    told = []
    for name in trained:
        read = [(node, _looked_up(node, table)) for node, table in _readers(graph, name)]
        others = [node for node, count in read if count is None]
        if others and len(others) < len(read):
            where = f" in module {module_of(others[0])!r}" if module_of(others[0]) else ""
            told.append(f"{name!r} is read by {others[0].target} too{where}")
    return "; ".join(told)


def _readers(graph: JointGraph, name: str) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What reads a parameter in the forward, and the placeholder that it reads."""
    for table in filter(None, (graph.params.get(name), graph.copies.get(name))):
        for node in table.users:
            if node.op == "call_function" and phase_of(node) is Phase.FORWARD:
                yield node, table


def _looked_up(node: fx.Node, table: fx.Node) -> int | None:
    """How many rows an operator looks up in a table; None where it reads it otherwise."""
    args = node.args
    if args[0] is not table or args.count(table) > 1:
        return None
    if node.target in _INDICES:
        return _count(args[_INDICES[node.target]])
    if node.target is aten.index_select.default and args[1] == 0:
        return _count(args[2])
    if node.target is aten.index.Tensor and isinstance(args[1], (list, tuple)):
        first, *rest = args[1]
        return _count(first) if all(each is None for each in rest) else None
    return None


def _count(indices: Any) -> int | None:
    value = indices.meta["val"] if isinstance(indices, fx.Node) else None
    if isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64):
        return value.numel()
    return None  # such as a mask of truths

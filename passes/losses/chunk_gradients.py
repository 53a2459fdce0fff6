"""The gradients of losses in pieces (`compiler.losses.pieces`), in the joint graph.

Differentiation makes one operator of them, which makes each piece of the logits once. Where weight
gradients run later than what other stages wait for, there are two, and logits are made once more:

    chunked_loss_backward ─▶ hidden, weight, bias          one operator
    chunked_loss_backward ─▶ hidden                        B
    chunked_loss_backward ─▶ weight, bias                  W
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from ...compiler.ir.graph import JointGraph, is_getitem
from ...compiler.losses.pieces import BACKWARD


def split_chunks(graph: JointGraph) -> str:
    """Split what makes gradients, where weight gradients run later; returns a note."""
    count = 0
    for node in list(graph.graph.nodes):
        if node.target is BACKWARD:
            wants = list(node.args[-1])
            if wants[0] and any(wants[1:]):
                _split(graph, node, wants)
                count += 1
    return f"{count} weight gradients of losses run later" if count else ""


def _split(graph: JointGraph, node: fx.Node, wants: list[bool]) -> None:
    """Replace one operator by two."""
    values = node.meta["val"]
    parts = ([True, False, False], [False, *wants[1:]])
    made: list[fx.Node] = []
    with graph.graph.inserting_after(node):
        for part, vals in reversed(list(zip(parts, (values[:1], values[1:]), strict=True))):
            new = graph.graph.call_function(BACKWARD, (*node.args[:-1], part))
            new.meta = {**node.meta, "val": vals}
            made.insert(0, new)
    for item in list(_items(node)):
        index = item.args[1]
        assert isinstance(index, int)
        item.args = (made[0], 0) if index == 0 else (made[1], index - 1)
    graph.graph.erase_node(node)


def _items(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        assert is_getitem(user)
        assert user.target is operator.getitem
        yield user

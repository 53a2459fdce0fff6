"""Reads of buffers that forward updates become values of the microbatch.

Such a buffer has another value after every microbatch, and its tensor is written over. So a
forward reads it once, into a value of its own, on one stage: what needs it later, on other stages
and in the backward, gets that value, as any other.
"""

from __future__ import annotations

import torch
from torch import fx

from ...compiler.ir.graph import JointGraph, Phase, module_of, phase_of


def read_once(graph: JointGraph) -> int:
    """Insert the reads, in place; how many there are."""
    count = 0
    for name, new in list(graph.mutations.items()):
        buffer = graph.buffers.get(name)
        if buffer is None or new is buffer:
            continue
        users = [user for user in buffer.users if user.op != "output"]
        if users or buffer in graph.results:
            _read(graph, name, buffer, users)
            count += 1
    if count:
        graph.set_output()
    return count


def _read(graph: JointGraph, name: str, buffer: fx.Node, users: list[fx.Node]) -> None:
    made = (node for node in graph.graph.nodes if node.op != "placeholder")
    last = next(node for node in made if node.op == "output" or phase_of(node) is Phase.BACKWARD)
    with graph.graph.inserting_before(min((*users, last))):
        read = graph.graph.call_function(torch.ops.aten.clone.default, (buffer,))
    read.meta = {
        "val": buffer.meta["val"].clone(),
        "phase": Phase.FORWARD,
        "partner": -2,  # no backward op's
        "module": module_of(min(users)) if users else "",
        "latest": name,
    }
    buffer.replace_all_uses_with(read, delete_user_cb=lambda user: user is not read)
    graph.results = tuple(read if node is buffer else node for node in graph.results)
    for other, node in graph.mutations.items():
        graph.mutations[other] = read if node is buffer else node

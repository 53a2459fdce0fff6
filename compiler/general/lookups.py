"""Tables that a batch is too long for, told before anything runs.

Where a model looks up a position that follows from the sizes of the batch alone, as GPT-2 does, the
graph has all indices in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..ir.errors import BatchError
from ..ir.graph import JointGraph, is_operator, is_random, module_of
from ..tensors.fakes import is_fake

aten = torch.ops.aten
_TABLES = (aten.embedding.default, aten.index_select.default)
_MOST_ELEMENTS = 1 << 24  # of indices that are worked out


def check_lookups(graph: JointGraph, said: str) -> None:
    """Whether all indices that no batch changes are in their tables.

    Args:
        said: of the batch, for the error.

    Raises:
        BatchError: one is not.
    """
    for node, size, indices in _lookups(graph):
        least, most = int(indices.min()), int(indices.max())
        if least < 0 or most >= size:
            where = f"module {module_of(node)!r}" if module_of(node) else "the model"
            raise BatchError(
                f"{where} would look up index {most if most >= size else least} in a table of "
                f"{size} for a microbatch of ({said}): give shorter rows, or a model with a larger "
                "table"
            )


def _lookups(graph: JointGraph) -> Iterator[tuple[fx.Node, int, torch.Tensor]]:
    """Each lookup by known indices, with the length of its table."""
    known: dict[fx.Node, torch.Tensor | None] = {}
    for node in graph.graph.nodes:
        if node.target not in _TABLES:
            continue
        table = node.args[0].meta["val"]
        embeds = node.target is aten.embedding.default
        dim, indices = (0, node.args[1]) if embeds else node.args[1:3]
        values = _value(graph, indices, known)
        if values is not None and values.numel():
            yield node, int(table.shape[dim]), values


def _value(
    graph: JointGraph, node: fx.Node, known: dict[fx.Node, torch.Tensor | None]
) -> torch.Tensor | None:
    """What a node makes, if that is whole numbers that follow from constants alone, and few."""
    val = node.meta.get("val")
    if node not in known and isinstance(val, torch.Tensor) and not val.is_floating_point():
        known[node] = _made(graph, node, known) if val.numel() <= _MOST_ELEMENTS else None
    return known.get(node)


def _made(
    graph: JointGraph, node: fx.Node, known: dict[fx.Node, torch.Tensor | None]
) -> torch.Tensor | None:
    if node.op == "get_attr":
        held = getattr(graph.constants, str(node.target))
        return None if is_fake(held) else held.cpu()
    if not is_operator(node) or is_random(node):
        return None
    if any(_value(graph, source, known) is None for source in node.all_input_nodes):
        return None
    target: Any = node.target
    args: Any = fx.map_arg(node.args, known.__getitem__)
    kwargs: Any = fx.map_arg(node.kwargs, known.__getitem__)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    made = target(*args, **kwargs)
    return made if isinstance(made, torch.Tensor) else None

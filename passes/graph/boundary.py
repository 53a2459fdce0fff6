"""What crosses a stage boundary travels in the narrowest dtype that says the same.

A value that was widened from bf16 or fp16 is not sent: what it was made from is, and every stage
that reads it widens that again. With ``Precision(boundary=...)`` the fp32 values that remain are
rounded before they are sent; gradients of tied weights are not, as these are summed up. So it is
with ``compress={"values": ...}``; in int8 rows of numbers have a scale each, and values in bf16 and
fp16 are rounded too.

    v ──▶ reader on another stage        becomes        v ▶ narrow ──▶ wide ▶ reader
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from ...compiler.compression.rows import from_int8, packed_nbytes, saves, to_int8
from ...compiler.ir.graph import JointGraph, Phase, nbytes, phase_of
from ...compiler.ir.locality import Locality, gradient_sums
from .casts import CAST, is_widening, widen_for

TO_INT8 = torch.ops.pipecompile.to_int8.default
FROM_INT8 = torch.ops.pipecompile.from_int8.default


@dataclass(frozen=True)
class Crossings:
    """A graph in which narrow values cross.

    Attributes:
        locality, stage: of all its nodes, new casts included.
        inserted: new cast -> the value that it stands for, in the order in which they were made.
        rounded: how many values are rounded before they are sent.
    """

    locality: Locality
    stage: dict[fx.Node, int]
    inserted: dict[fx.Node, fx.Node]
    rounded: int = 0


def narrow_crossings(
    graph: JointGraph,
    locality: Locality,
    stage: dict[fx.Node, int],
    boundary: torch.dtype | None,
    per_step: bool,
) -> Crossings:
    """Insert the casts, in place.

    Args:
        stage: of every staged node.
        boundary: dtype of fp32 values between stages; int8 with a scale for each row, of other
            floats too; None for as they are.
        per_step: parts of tied gradients do not travel with the microbatches.
    """
    sums = gradient_sums(graph)
    skipped = sums if per_step else set()
    made, rounded = Crossings(locality, dict(stage), {}), 0
    for node in locality.staged:
        readers = [u for u in node.users if u in stage and u not in skipped]
        away = [u for u in readers if stage[u] != stage[node]]
        source = sent_as(node, boundary, [u for u in away if u not in sums]) if away else None
        if source is None:
            continue
        if source is node:
            away = [u for u in away if u not in sums]
            source, rounded = _narrow(made, node, boundary), rounded + 1
        for group in _groups(away, stage):
            wide = widen_for(group, node, source)
            if source.target is TO_INT8:
                _unpack(wide, node)
            made.inserted[wide], made.stage[wide] = node, stage[group[0]]
    unread = {n for n in made.inserted.values() if not n.users}
    staged = (set(locality.staged) | set(made.inserted)) - unread
    placed = tuple(node for node in graph.graph.nodes if node in staged)
    kept = {n: s for n, s in made.stage.items() if n not in unread}
    return replace(made, locality=replace(locality, staged=placed), stage=kept, rounded=rounded)


def sent_as(node: fx.Node, boundary: torch.dtype | None, rounded: list[fx.Node]) -> fx.Node | None:
    """What is sent for a value: what it was widened from, the value itself in ``boundary``'s
    dtype, or None if it goes as it is.

    Args:
        rounded: the readers on other stages that may get a rounded value.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    if boundary is torch.int8 and rounded and saves(value):
        return node
    if is_widening(node):
        (source,) = node.all_input_nodes
        made_here = source.op == "call_function" and phase_of(source) is phase_of(node)
        return source if made_here and nbytes(source) < nbytes(node) else None
    casts = boundary is not None and boundary is not torch.int8
    return node if casts and value.dtype is torch.float32 and rounded else None


def crossing_nbytes(node: fx.Node, boundary: torch.dtype | None) -> int:
    """Bytes that are sent for a value, for what it costs to divide the graph behind it."""
    source = sent_as(node, boundary, [node])
    if source is node and boundary is torch.int8:
        return packed_nbytes(node.meta["val"])
    if source is node and boundary is not None:
        return nbytes(node) * boundary.itemsize // torch.float32.itemsize
    return nbytes(source or node)


def _groups(readers: list[fx.Node], stage: dict[fx.Node, int]) -> Iterator[list[fx.Node]]:
    """Readers that one cast can serve: on one stage, all in its forward or for one backward."""
    groups: dict[tuple[int, int | None], list[fx.Node]] = defaultdict(list)
    for reader in readers:
        forward = phase_of(reader) is Phase.FORWARD
        groups[stage[reader], None if forward else reader.meta["partner"]].append(reader)
    yield from groups.values()


def _narrow(made: Crossings, node: fx.Node, dtype: torch.dtype | None) -> fx.Node:
    value = node.meta["val"]
    with node.graph.inserting_after(node):
        if dtype is torch.int8:
            narrow = node.graph.call_function(TO_INT8, (node,))
            value = to_int8(value)
        else:
            narrow = node.graph.call_function(CAST, (node,), {"dtype": dtype})
            value = value.to(dtype)
    narrow.meta = {**node.meta, "val": value}
    made.inserted[narrow] = node
    made.stage[narrow] = made.stage[node]
    return narrow


def _unpack(wide: fx.Node, node: fx.Node) -> None:
    """Let a cast that was made for some readers be the inverse of `to_int8`."""
    value = node.meta["val"]
    wide.target = FROM_INT8
    wide.args, wide.kwargs = (*wide.args, list(value.stride()), value.dtype), {}
    wide.meta["val"] = from_int8(wide.all_input_nodes[0].meta["val"], value.stride(), value.dtype)

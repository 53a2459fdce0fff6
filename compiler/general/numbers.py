"""Graphs with numbers of the batch as inputs, beside those that have them as literals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..answers.inputs import NumberError
from ..capture.batch import BatchSpec
from ..capture.capture import Captured
from ..ir.graph import JointGraph


def check_numbers(
    found: Captured, spec: BatchSpec, values: Sequence[torch.Tensor], literal: Captured
) -> None:
    """Whether a graph is, for the numbers of this batch, the one that has them as literals.

    Args:
        spec, values: of the batch, with numbers among the leaves.
        literal: what was traced with them among the constants.

    Raises:
        NumberError: it is another one, or its loss is another.
    """
    floats = dict(enumerate(found.scalars.of(values), len(spec.leaves)))
    graph = _with_literals(found.graph, floats, spec.plain_leaves)
    why = ""
    if graph.fingerprint() != literal.graph.fingerprint():
        why = "forward does other things with numbers that it can look at"
    elif found.outputs != literal.outputs or _form(found) != _form(literal):
        why = "microbatches are weighed by it"
    if why:
        raise NumberError({spec.leaves[i].name: why for i in spec.plain_leaves})


def _form(captured: Captured) -> tuple[Any, ...]:
    """What is told of a loss."""
    loss = captured.loss
    return () if loss is None else (loss.terms, loss.factored, loss.note, loss.warning)


def _with_literals(
    graph: JointGraph, floats: Mapping[int, float], dropped: Sequence[int]
) -> JointGraph:
    """A graph with literals for some inputs, and without others.

    Args:
        floats: input -> the literal.
        dropped: inputs that nothing reads.
    """
    made = fx.Graph()
    twin: dict[fx.Node, Any] = {}
    index = {node: i for i, node in graph.inputs.items()}
    for node in graph.graph.nodes:
        if index.get(node) in floats:
            twin[node] = floats[index[node]]
        elif node.op != "output" and index.get(node) not in dropped:
            twin[node] = _copied(made, node, twin)
    kept = [i for i in graph.inputs if i not in floats and i not in dropped]
    named = JointGraph(**{**vars(graph), "inputs": {i: graph.inputs[i] for i in kept}})
    moved = named.moved(made, twin)
    moved.inputs = {_without(i, [*floats, *dropped]): moved.inputs[i] for i in kept}
    moved.set_output()
    return moved


def _copied(made: fx.Graph, node: fx.Node, twin: Mapping[fx.Node, Any]) -> fx.Node:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), twin.__getitem__)
    new = made.create_node(node.op, node.target, args, kwargs, node.name)
    new.meta = dict(node.meta)
    return new


def _without(index: int, others: Sequence[int]) -> int:
    """What comes of an index where others are left out."""
    return index - sum(other < index for other in others)

"""Elementwise operators write over an input that nothing reads again.

    add = torch.ops.aten.add.Tensor(mm, mm_1)      ->  torch.ops.aten.add_.Tensor(mm, mm_1)
    tanh_backward = torch.ops.aten.tanh_backward.default(mul, tanh)
                                                   ->  ...grad_input(mul, tanh, grad_input=mul)

The same kernels then compute the same bits in half the memory, which is in the cache already.
Works on stage programs, last of all: their order is fixed, so that it is known who reads last.
Never overwritten is what came from outside (parameters, buffers, the stash, messages), what a
program leaves behind, and gradients that were handed over.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...compiler.ir import ops
from ...compiler.ir.graph import is_getitem, is_operator, nbytes, overwritten, storage_root
from ...compiler.ir.program import PipelineProgram, Program

_ATEN = torch.ops.aten
_COMMUTES = {_ATEN.mul.Tensor, _ATEN.add.Tensor}
_OUT = {
    packet.default: packet.grad_input
    for packet in (
        _ATEN.elu_backward,
        _ATEN.gelu_backward,
        _ATEN.hardsigmoid_backward,
        _ATEN.hardtanh_backward,
        _ATEN.leaky_relu_backward,
        _ATEN.mse_loss_backward,
        _ATEN.sigmoid_backward,
        _ATEN.silu_backward,
        _ATEN.softplus_backward,
        _ATEN.tanh_backward,
        _ATEN.threshold_backward,
    )
} | {_ATEN.where.self: _ATEN.where.self_out}
"""Operators without an in-place twin -> the overload whose last argument tells where to write."""
_ROWS = {
    packet.default: packet.out
    for packet in (
        _ATEN._softmax,
        _ATEN._log_softmax,
        _ATEN._softmax_backward_data,
        _ATEN._log_softmax_backward_data,
    )
}
"""Not elementwise, but CPU kernels read a row of a contiguous tensor before they write to it."""
_READING = {writing: reading for reading, writing in (_OUT | _ROWS).items()}


@dataclass
class Reuse:
    """Counts elementwise operators, those that write over an input, and copies left out."""

    elementwise: int = 0
    overwriting: int = 0
    copies: int = 0

    def __str__(self) -> str:
        copies = f"; {self.copies} copies left out" if self.copies else ""
        return f"{self.overwriting} of {self.elementwise} write over an input{copies}"


def reuse_memory(program: PipelineProgram, device: str) -> Reuse:
    """Rewrite the programs of all stages where they stand.

    Args:
        device: its type; some is done on "cpu" alone, where it is known how kernels read.
    """
    reuse = Reuse()
    for stage in program.stages:
        for part in stage.parts.values():
            _drop_copies(part, reuse)
            _overwrite(part, device, reuse)
            part.module.graph.lint()
            part.module.recompile()
    return reuse


def _drop_copies(program: Program, reuse: Reuse) -> None:
    """Leave out clones that change no layout: without writes a copy is the thing itself."""
    graph = program.module.graph
    (output,) = graph.find_nodes(op="output")
    left = Counter(storage_root(source) for source in output.all_input_nodes)
    for node in graph.find_nodes(op="call_function", target=_ATEN.clone.default):
        source = node.args[0]
        root = storage_root(source)
        twice = left[node] and left[root]  # whoever gets both may expect them apart
        if root.op != "call_function" or twice or not _alike(node, source):
            continue
        if nbytes(root) == nbytes(node):
            left[root] += left[node]
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            reuse.copies += 1


def _overwrite(program: Program, device: str, reuse: Reuse) -> None:
    nodes = list(program.module.graph.nodes)
    blocks: dict[fx.Node, fx.Node] = {}  # node -> the node that made the memory it lies in
    last: dict[fx.Node, int] = {}  # of a block: its last reader
    for i, node in enumerate(nodes):
        for source in (node, *node.all_input_nodes):
            last[storage_root(source)] = i
    given = {storage_root(n.args[1]) for n in nodes if n.target is ops.accumulate}
    for i, node in enumerate(nodes):
        root = storage_root(node)
        blocks[node] = blocks.get(root, root)
        if not _is_elementwise(node, device):
            continue
        reuse.elementwise += 1
        for source in _candidates(node, device):
            block = blocks[source]
            shared = [other for other in node.all_input_nodes if blocks[other] is block]
            if last[block] > i or block in given or shared != [source]:
                continue
            if nbytes(block) == nbytes(node) and _write_over(node, source):
                blocks[node], last[block] = block, last[node]
                given |= {block} if node in given else set()
                reuse.overwriting += 1
                break


def _is_elementwise(node: fx.Node, device: str) -> bool:
    if not is_operator(node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    target: Any = node.target
    if target in _ROWS:
        return device == "cpu"
    return target in _OUT or torch.Tag.pointwise in target.tags


def _candidates(node: fx.Node, device: str) -> list[fx.Node]:
    """Inputs of the result's layout in memory that a program made itself."""
    found = []
    for source in node.all_input_nodes:
        root = storage_root(source)
        # GPU kernels may give slices of one block as their items, in another layout than the
        # compiler was told
        unsure = is_getitem(root) and device != "cpu"
        if root.op != "call_function" or unsure or not _alike(node, source):
            continue
        if node.target not in _ROWS or source.meta["val"].is_contiguous():
            found.append(source)
    return found


def _alike(node: fx.Node, source: fx.Node) -> bool:
    made, given = node.meta["val"], source.meta.get("val")
    return (
        isinstance(given, torch.Tensor)
        and (given.shape, given.stride(), given.dtype) == (made.shape, made.stride(), made.dtype)
        and given.device == made.device
    )


def _write_over(node: fx.Node, source: fx.Node) -> bool:
    """Let a node write its value over a source's; whether there is an overload for it."""
    target: Any = node.target
    if target in _OUT or target in _ROWS:
        node.target = (_OUT | _ROWS)[target]
        node.kwargs = {**node.kwargs, node.target._schema.arguments[-1].name: source}
        return True
    twin = _twin(target)
    if twin is None:
        return False
    first, *rest = node.args
    if first is not source:
        if target not in _COMMUTES or node.kwargs or rest != [source]:
            return False
        node.args = (source, first)
    node.target = twin
    return True


def functional(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Operator, arguments and keywords with which a node has the same value, and writes over
    nothing: its own, where it does not."""
    target: Any = node.target
    if overwritten(node) is None:
        return target, node.args, dict(node.kwargs)
    if target in _READING:
        written = target._schema.arguments[-1].name
        return _READING[target], node.args, {k: v for k, v in node.kwargs.items() if k != written}
    name, _, overload = target.name().removeprefix("aten::").partition(".")
    packet = getattr(_ATEN, name.removesuffix("_"))
    return getattr(packet, overload or "default"), node.args, dict(node.kwargs)


def _twin(target: Any) -> Any:
    """``mul_.Tensor`` of ``mul.Tensor``, None where there is none."""
    name, _, overload = target.name().removeprefix("aten::").partition(".")
    twin = getattr(getattr(_ATEN, f"{name}_", None), overload or "default", None)
    if twin is None:
        return None
    # pow.Scalar has the base as a number, pow_.Scalar the exponent
    kinds = [[str(a.type) for a in op._schema.arguments] for op in (target, twin)]
    return twin if kinds[0] == kinds[1] else None

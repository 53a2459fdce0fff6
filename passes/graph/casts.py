"""Casts in a differentiated graph: as few as make the same bits, and where they cost least.

The casts that `passes.graph.autocast` inserted come out of differentiation with their derivatives.

============================  ===============================================================
what stands there             what becomes of it
============================  ===============================================================
x → fp32 → dtype of x         x: widening is exact                                         [1]
equal casts of one value      one; their derivatives stay apart, and add up in fp32        [2]
a parameter → narrow          an argument, the parameter's copy: cast once per step        [3]
gradient → fp32 → its slot    the narrow gradient: adding it into an fp32 slot widens it   [4]
x → fp32, for the backward    x is kept, and widened again where it is read                [5]
a value → narrow              right after the value is made: that travels, if it suffices  [6]
fp32 + (x → fp32)             fp32 + x: the sum widens it                                  [7]
============================  ===============================================================
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from torch import fx

from ...compiler.ir.graph import (
    JointGraph,
    Phase,
    module_of,
    nbytes,
    phase_of,
    storage_root,
    tensors,
)
from ...compiler.ir.precision import REDUCED

CAST = torch.ops.aten._to_copy.default


def read_copies(graph: JointGraph, held: Mapping[str, torch.dtype]) -> str:
    """Let a graph that was traced with narrow parameters and buffers read those that are held.

    ==========  =================================================================================
    parameter   its copy is read, which is cast once per step; the gradient of that is its own
    buffer      is cast where the graph begins; its new value is widened, so that the held one has
                the narrow value's bits
    ==========  =================================================================================

    Args:
        held: the dtype of each, by name.
    """
    (*_, last) = graph.graph.find_nodes(op="placeholder")
    for name, param in graph.params.items():
        val = param.meta["val"].detach()
        if held[name] is val.dtype:
            continue
        with graph.graph.inserting_after(last):
            copy = last = graph.graph.placeholder(f"{param.name}_copy")
        copy.meta, param.meta = param.meta, {**param.meta, "val": val.to(held[name])}
        graph.copies[name] = copy
        param.replace_all_uses_with(copy)
        _rename(graph, param, copy)
    cast = 0
    for name, buffer in graph.buffers.items():
        val = buffer.meta["val"].detach()
        if held[name] is val.dtype:
            continue
        last, cast = _cast_buffer(graph, name, last, val.to(held[name])), cast + 1
    graph.set_output()
    return f"{len(graph.copies)} parameters and {cast} buffers are read in another dtype"


def _cast_buffer(graph: JointGraph, name: str, last: fx.Node, wide: torch.Tensor) -> fx.Node:
    """The narrow value of a buffer, made after the last of what is given."""
    buffer, new = graph.buffers[name], graph.mutations.get(name)
    narrow = buffer.meta["val"].dtype
    with graph.graph.inserting_after(last):
        read = graph.graph.call_function(CAST, (buffer,), {"dtype": narrow})
    users = [user for user in buffer.users if user not in (read,) and user.op != "output"]
    own = {"phase": Phase.FORWARD, "partner": -2}  # no backward op's
    module = module_of(min(users)) if users else ""
    read.meta = {"val": buffer.meta["val"].detach(), "module": module, **own}
    buffer.meta = {**buffer.meta, "val": wide}
    buffer.replace_all_uses_with(read, delete_user_cb=lambda user: user is not read)
    _rename(graph, buffer, read)
    if new is buffer:
        del graph.mutations[name]
    elif new is not None:
        with graph.graph.inserting_after(new if new.op != "placeholder" else read):
            widened = graph.graph.call_function(CAST, (new,), {"dtype": wide.dtype})
        widened.meta = {**new.meta, **own, "val": new.meta["val"].detach().to(wide.dtype)}
        graph.mutations[name] = widened
    return read


def settle_casts(graph: JointGraph, compute: torch.dtype) -> str:
    """Rewrite the graph in place; every value keeps its bits. Returns a note.

    Args:
        compute: the dtype of the copies of parameters.
    """
    counts: Counter[str] = Counter()
    for node in list(graph.graph.nodes):
        _skip_widened(graph, node, counts)  # [1]
    _merge(graph, counts)  # [2]
    _copy_parameters(graph, compute)  # [3]
    for name, grad in graph.grads.items():  # [4]
        if is_widening(grad) and len(grad.users) == 1:
            graph.grads[name] = grad.all_input_nodes[0]
    for node in list(graph.graph.nodes):
        if is_widening(node) and phase_of(node) is Phase.FORWARD:
            _widen_again(node)  # [5]
    for node in list(graph.graph.nodes):
        if is_narrowing(node) and node.all_input_nodes[0].op == "call_function":
            node.all_input_nodes[0].append(node)  # [6]
    for node in graph.ops():
        _leave_to_sum(node)  # [7]
    graph.set_output()
    graph.graph.eliminate_dead_code()
    left = sum(is_cast(node) for node in graph.graph.nodes)
    parts = [f"{left} casts per microbatch, {len(graph.copies)} parameters cast once per step"]
    return "; ".join(parts + [f"{count} {what}" for what, count in counts.items()])


def is_cast(node: fx.Node) -> bool:
    """Whether a node changes nothing but the dtype, from one floating-point type to another."""
    if node.target is not CAST or len(node.args) != 1:
        return False
    source, made = node.all_input_nodes[0].meta["val"], node.meta["val"]
    same = (source.device, source.layout, source.stride()) == (
        made.device,
        made.layout,
        made.stride(),
    )
    return same and source.dtype.is_floating_point and made.dtype.is_floating_point


def is_widening(node: fx.Node) -> bool:
    """Whether a cast is exact: from bf16 or fp16 to a wider type."""
    if not is_cast(node):
        return False
    source, made = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return source.dtype in REDUCED and made.dtype not in REDUCED


def is_narrowing(node: fx.Node) -> bool:
    return is_cast(node) and node.meta["val"].dtype in REDUCED and not is_widening(node)


def _skip_widened(graph: JointGraph, node: fx.Node, counts: Counter[str]) -> None:
    if not is_cast(node) or not is_widening(node.all_input_nodes[0]):
        return
    (source,) = node.all_input_nodes[0].all_input_nodes
    counts["pairs cancelled"] += 1
    if source.meta["val"].dtype is node.meta["val"].dtype:
        _replace(graph, node, source)
    else:
        node.args = (source,)


def _merge(graph: JointGraph, counts: Counter[str]) -> None:
    first: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in list(graph.graph.nodes):
        if not is_cast(node) or phase_of(node) is not Phase.FORWARD:
            continue
        key = (node.all_input_nodes[0], node.meta["val"].dtype)
        if key in first:
            _replace(graph, node, first[key])
            counts["equal ones merged"] += 1
        else:
            first[key] = node


def _copy_parameters(graph: JointGraph, compute: torch.dtype) -> None:
    (*_, last) = graph.graph.find_nodes(op="placeholder")
    for name, param in graph.params.items():
        narrow = [u for u in param.users if is_narrowing(u)]
        for node in [u for u in narrow if u.meta["val"].dtype is compute]:
            with graph.graph.inserting_after(last):
                copy = last = graph.graph.placeholder(f"{param.name}_copy")
            copy.meta = {**param.meta, "val": node.meta["val"]}
            graph.copies[name] = copy
            _replace(graph, node, copy)


def _widen_again(node: fx.Node) -> None:
    """Give the backward of every forward operator that reads a widened value a cast of its own."""
    (source,) = node.all_input_nodes
    if source.op == "placeholder" or nbytes(storage_root(source)) >= nbytes(node):
        return
    readers: dict[int, list[fx.Node]] = defaultdict(list)
    for user in node.users:
        if user.op != "output" and phase_of(user) is Phase.BACKWARD:
            readers[user.meta["partner"]].append(user)
    for group in readers.values():
        widen_for(group, node, source)


def _leave_to_sum(node: fx.Node) -> None:
    if node.target is not torch.ops.aten.add.Tensor or len(node.all_input_nodes) != 2:
        return
    first, second = node.all_input_nodes
    for term, other in ((second, first), (first, second)):
        (value,) = tensors(other.meta["val"]) or (None,)
        wide = term.meta["val"]
        widens = value is not None and value.dtype is wide.dtype and (value.dim() or not wide.dim())
        if widens and is_widening(term):  # a number would not widen what it is added to
            node.replace_input_with(term, term.all_input_nodes[0])
            return


def widen_for(readers: list[fx.Node], node: fx.Node, source: fx.Node) -> fx.Node:
    """Let some readers of a value read a cast of another to its dtype, made right before them.

    Args:
        readers: of one phase and place.
    """
    place = min(readers)
    with place.graph.inserting_before(place):
        wide = place.graph.call_function(CAST, (source,), {"dtype": node.meta["val"].dtype})
    wide.meta = {
        **node.meta,
        "phase": phase_of(place),
        "partner": place.meta["partner"],
        "val": source.meta["val"].to(node.meta["val"].dtype),
    }
    if phase_of(place) is Phase.BACKWARD:
        wide.meta["recomputes"] = node.name
    for reader in readers:
        reader.replace_input_with(node, wide)
    return wide


def _replace(graph: JointGraph, node: fx.Node, other: fx.Node) -> None:
    """Let all that a node stands for be another one."""
    node.replace_all_uses_with(other)
    _rename(graph, node, other)
    graph.graph.erase_node(node)


def _rename(graph: JointGraph, node: fx.Node, other: fx.Node) -> None:
    """Let another node be what the graph names."""
    for named in (graph.grads, graph.mutations):
        for name, value in named.items():
            if value is node:
                named[name] = other
    graph.results = tuple(other if value is node else value for value in graph.results)
    if graph.loss is node:
        graph.loss = other

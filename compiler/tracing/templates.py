"""A call of a layer that was traced, and copies of its operators for other layers.

Nodes are copied into the graph that torch is recording: `track_tensor_tree` gives the results of a
copy their nodes. It has no public name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import track_tensor_tree
from torch.utils._python_dispatch import _disable_current_modes

from ..answers.known import node_of, proxy_mode
from ..effects.contents import Contents
from ..ir.graph import tensors, written
from ..tensors.facts import storage_of
from ..tensors.fakes import FakeTensor
from ..tensors.pytree import TreeSpec, tree_flatten, tree_unflatten
from .kept import outside_of_tracing
from .likeness import PLAIN, Place, layout

_ROOT = "_export_root"  # what torch calls that which it traces


class CopyError(Exception):
    """The graph has copies that it may not have."""


@dataclass(frozen=True)
class Call:
    """A call of a layer, as far as its code can see it.

    Attributes:
        leaves: of its arguments.
        state: its parameters and buffers.
        told: what Python may learn of the values of tensors: of each leaf, whether it has any.
        modes: of torch.
        nodes: of the tensors among the leaves, and of the state, as they were before.
    """

    part: nn.Module
    path: str
    leaves: Sequence[Any]
    tree: TreeSpec
    state: Sequence[torch.Tensor]
    told: Sequence[bool]
    modes: tuple[object, ...]
    nodes: Sequence[fx.Node]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*(leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)), *self.state]

    def describe(self) -> tuple[object, ...]:
        """Equal for calls whose arguments look the same, as they are now."""
        leaves = [
            layout(x) if isinstance(x, torch.Tensor) else (type(x), repr(x)) for x in self.leaves
        ]
        given = self.tensors
        shared = [_first(map(id, given)), _first(map(storage_of, given))]
        shared.append(_first(map(id, self.nodes)))
        return leaves, shared, list(map(layout, self.state)), self.told, self.modes


@dataclass(frozen=True)
class Template:
    """A call that was traced.

    Attributes:
        described: the call, as it was before.
        reads: the attributes that it read.
        outside: what else forward can reach, as it was before.
        nodes: its operators.
        results: leaves of what it returned: a node, the position of a leaf that it was given, or a
            plain value.
        likes: the tensors among them.
        renamed: the positions of tensors that operators have returned as they are, and which these
            were: torch takes such a tensor for their result from then on.
    """

    call: Call
    described: tuple[object, ...]
    reads: set[Place]
    outside: Contents
    nodes: Sequence[fx.Node]
    results: Sequence[Any]
    likes: Mapping[fx.Node, torch.Tensor]
    renamed: Mapping[int, fx.Node]
    tree: TreeSpec


def _first(values: Iterator[int]) -> list[int]:
    """Of each value where the first like it is."""
    places: dict[int, int] = {}
    return [places.setdefault(value, i) for i, value in enumerate(values)]


def template_of(
    call: Call,
    described: tuple[object, ...],
    reads: set[Place],
    outside: Contents,
    nodes: list[fx.Node],
    output: Any,
) -> Template | None:
    """Of a call, if it is made of operators on what it was given, and writes into nothing else."""
    given = set(call.nodes)
    if any(node.op != "call_function" for node in nodes):
        return None
    inner = set(nodes)
    if any(source not in inner | given for node in nodes for source in node.all_input_nodes):
        return None
    theirs = {storage_of(x) for node in given for x in tensors(node.meta["val"])}
    theirs.update(map(storage_of, call.tensors))
    for node in nodes:
        if "val" not in node.meta and node.all_input_nodes:
            return None
        for target in written(node):
            if any(storage_of(x) in theirs for x in tensors(target.meta["val"])):
                return None
    leaves, tree = tree_flatten(output)
    results: list[Any] = []
    likes: dict[fx.Node, torch.Tensor] = {}
    for leaf in leaves:
        place = next((i for i, x in enumerate(call.leaves) if x is leaf), None)
        if type(leaf) in PLAIN:
            results.append((leaf,))
        elif place is not None:
            results.append(place)
        elif type(leaf) is FakeTensor and (made := node_of(leaf)) is not None and made in inner:
            if storage_of(leaf) in theirs or likes.setdefault(made, leaf) is not leaf:
                return None
            results.append(made)
        else:
            return None
    places = list(map(storage_of, likes.values()))
    if len(set(places)) < len(places):
        return None
    renamed: dict[int, fx.Node] = {}
    for i, (tensor, old) in enumerate(zip(call.tensors, call.nodes, strict=True)):
        now = node_of(tensor)
        if now is None or (now is not old and now not in inner):
            return None
        if now is not old:
            renamed[i] = now
    return Template(call, described, reads, outside, nodes, results, likes, renamed, tree)


def copied(template: Template, call: Call) -> Any:
    """The results of a call, with copies of a template's operators for them."""
    tracer = proxy_mode().tracer
    first = template.call
    twin: dict[fx.Node, fx.Node] = {}
    twin |= zip(first.nodes, call.nodes, strict=True)
    given = list(twin.items())
    for node in template.nodes:
        args = fx.node.map_arg(node.args, twin.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, twin.__getitem__)
        name = re.sub(r"_\d+$", "", node.name)
        twin[node] = tracer.graph.create_node(node.op, node.target, args, kwargs, name)
        twin[node].meta = _moved(node.meta, first.path, call.path)
    made: dict[fx.Node, torch.Tensor] = {}
    for node, like in template.likes.items():
        with outside_of_tracing(), torch._C.DisableTorchFunction():
            made[node] = _made(like)
        track_tensor_tree(made[node], tracer.proxy(twin[node]), constant=None, tracer=tracer)
    for position, node in template.renamed.items():
        proxy = tracer.proxy(twin[node])
        track_tensor_tree(call.tensors[position], proxy, constant=None, tracer=tracer)
    named = (*template.likes, *template.renamed.values())
    known = [*given, *((node, twin[node]) for node in named)]
    _give_values(template.nodes, twin, known)
    results = [
        result[0]
        if isinstance(result, tuple)
        else made[result]
        if isinstance(result, fx.Node)
        else call.leaves[result]
        for result in template.results
    ]
    return tree_unflatten(results, template.tree)


def _made(like: torch.Tensor) -> torch.Tensor:
    """A tensor that looks like another one, with memory of its own."""
    made = like.detach().new_empty_strided(like.shape, like.stride())
    if like.requires_grad:
        made = made.requires_grad_().clone()  # a leaf could not be written into
    if layout(made) != layout(like):
        raise CopyError(f"a copy is {layout(made)}, and not {layout(like)}")
    return made


def _moved(meta: Mapping[str, Any], path: str, to: str) -> dict[str, Any]:
    """Of a node of one layer what it is in another."""
    moved = dict(meta)
    stack = meta.get("nn_module_stack")
    if stack:
        inner = re.compile(rf"(?<=^{_ROOT}\.){re.escape(path)}(?=\.|$)")
        moved["nn_module_stack"] = {
            inner.sub(to, key): (inner.sub(to, where), *rest)
            for key, (where, *rest) in stack.items()
        }
    return moved


def _give_values(
    nodes: Sequence[fx.Node],
    twin: Mapping[fx.Node, fx.Node],
    known: Sequence[tuple[fx.Node, fx.Node]],
) -> None:
    """Fake values, which lie in the same memory as each other where those of the template do.

    Args:
        known: nodes and their twins that have theirs.
    """
    memory: dict[int, torch.UntypedStorage] = {}
    done = {node for node, _ in known}
    for node, mine in known:
        pairs = zip(tensors(node.meta["val"]), tensors(mine.meta["val"]), strict=True)
        memory |= {storage_of(a): b.untyped_storage() for a, b in pairs}

    def valued(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)([*map(valued, value)])
        if not isinstance(value, torch.Tensor):
            return value
        if type(value) is not FakeTensor:
            raise CopyError(f"a value is a {type(value).__name__}")
        place = storage_of(value)
        if place not in memory:
            room = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8, device="meta")
            memory[place] = room.untyped_storage()
        made = torch.empty(0, dtype=value.dtype, device="meta")
        made.set_(memory[place], value.storage_offset(), value.shape, value.stride())
        return FakeTensor(value.fake_mode, made, value.device)

    with _disable_current_modes(), outside_of_tracing(), torch._C.DisableTorchFunction():
        for node in nodes:
            if node not in done and "val" in node.meta:
                twin[node].meta["val"] = valued(node.meta["val"])

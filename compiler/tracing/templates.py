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
from ..tensors.facts import extent, storage_of
from ..tensors.fakes import FakeTensor, on_memory
from ..tensors.pytree import TreeSpec, tree_flatten, tree_unflatten
from .helpers import Asked, StandIn, asked_again, is_helper
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

    @property
    def helper(self) -> object:
        """The object among the arguments whose methods may be called; None if there is none."""
        return next(filter(is_helper, self.leaves), None)

    def submodule(self, path: str) -> nn.Module:
        found: nn.Module = dict(self.part.named_modules(remove_duplicate=False))[path]
        return found

    def describe(self) -> tuple[object, ...]:
        """Equal for calls whose arguments look the same, as they are now."""
        leaves = [
            layout(x)
            if isinstance(x, torch.Tensor)
            else (type(x), repr(x) if type(x) in PLAIN else id(x))
            for x in self.leaves
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
        steps: its operators, and calls of its helper's methods with operators of their own.
        results: leaves of what it returned: a node, the position of a leaf that it was given, or a
            plain value.
        likes: the tensors among them.
        renamed: the positions of tensors that operators have returned as they are, and which these
            were: torch takes such a tensor for their result from then on. First come the call's
            tensors, then those that the helper's methods returned.
    """

    call: Call
    described: tuple[object, ...]
    reads: set[Place]
    outside: Contents
    steps: Sequence[fx.Node | Asked]
    results: Sequence[Any]
    likes: Mapping[fx.Node, torch.Tensor]
    renamed: Mapping[int, fx.Node]
    tree: TreeSpec

    @property
    def nodes(self) -> list[fx.Node]:
        return [node for step in self.steps for node in _nodes(step)]

    @property
    def asked(self) -> list[Asked]:
        return [step for step in self.steps if isinstance(step, Asked)]

    @property
    def handed(self) -> list[Place]:
        """The attributes of the layer that only its helper's methods got."""
        leaves = (leaf for each in self.asked for leaf in each.leaves)
        return [leaf.place for leaf in leaves if type(leaf) is StandIn]


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
    asked: Sequence[Asked] = (),
) -> Template | None:
    """Of a call, if it is made of operators on what it was given, and writes into nothing else.

    Args:
        asked: what it has called of its helper.
    """
    steps = _steps(nodes, asked)
    theirs = {storage_of(x) for node in call.nodes for x in tensors(node.meta["val"])}
    theirs.update(map(storage_of, call.tensors))
    if not _is_closed(steps, set(call.nodes), theirs):
        return None
    inner = {step for step in steps if isinstance(step, fx.Node)}
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
    before: list[tuple[torch.Tensor, fx.Node | None]] = []
    before += zip(call.tensors, call.nodes, strict=True)
    before += (pair for each in asked for pair in zip(each.made_tensors, each.made, strict=True))
    for i, (tensor, old) in enumerate(before):
        now = node_of(tensor)
        if now is None or (now is not old and now not in inner):
            return None
        if now is not old:
            renamed[i] = now
    return Template(call, described, reads, outside, steps, results, likes, renamed, tree)


def _steps(nodes: Sequence[fx.Node], asked: Sequence[Asked]) -> list[fx.Node | Asked]:
    """What a layer did, in order."""
    steps: list[fx.Node | Asked] = []
    places = {node: i + 1 for i, node in enumerate(nodes)}
    done = 0
    for each in asked:
        start = places.get(each.after, 0) if each.after is not None else 0
        steps += (*nodes[done:start], each)
        done = start + len(each.nodes)
    return [*steps, *nodes[done:]]


def _nodes(step: fx.Node | Asked) -> Sequence[fx.Node]:
    return step.nodes if isinstance(step, Asked) else (step,)


def _is_closed(steps: Sequence[fx.Node | Asked], readable: set[fx.Node], theirs: set[int]) -> bool:
    """Whether operators read only what the layer was given, made itself, or got of its helper, and
    write only into what it made itself; the helper's read only what they were given, and make new
    tensors.

    Args:
        theirs: the memory of what the layer was given; gets that of what it got of its helper.
    """
    memory = set(theirs)
    for step in steps:
        asks = isinstance(step, Asked)
        known = set(step.given) if isinstance(step, Asked) else readable
        if not known <= readable:
            return False
        for node in _nodes(step):
            if node.op != "call_function" and not (asks and node.op == "get_attr"):
                return False
            sources = set(node.all_input_nodes)
            if not sources <= known or (sources and "val" not in node.meta):
                return False
            into = {storage_of(x) for each in written(node) for x in tensors(each.meta["val"])}
            if into & (memory if asks else theirs):
                return False
            known.add(node)
        if isinstance(step, Asked):
            places = list(map(storage_of, step.made_tensors))
            if not set(step.made) <= set(step.nodes) or len(set(step.made)) < len(step.made):
                return False
            if memory.intersection(places) or len(set(places)) < len(places):
                return False
            readable |= {node for node in step.made if node is not None}
            theirs.update(places)
        values = (node.meta.get("val") for node in _nodes(step))
        memory |= {storage_of(x) for value in values for x in tensors(value)}
    return True


def copied(template: Template, call: Call) -> Any:
    """The results of a call, with copies of a template's operators for them.

    Raises:
        CopyError: a method of its helper did not do what it did for the template.
    """
    tracer = proxy_mode().tracer
    first = template.call
    twin: dict[fx.Node, fx.Node] = {}
    twin |= zip(first.nodes, call.nodes, strict=True)
    known = list(twin.items())
    given = call.tensors
    for step in template.steps:
        if isinstance(step, Asked):
            again, made = _again(step, first, call, twin)
            known += (pair for pair in again.items() if "val" in pair[0].meta)
            given += made
            continue
        args = fx.node.map_arg(step.args, twin.__getitem__)
        kwargs = fx.node.map_arg(step.kwargs, twin.__getitem__)
        name = re.sub(r"_\d+$", "", step.name)
        twin[step] = tracer.graph.create_node(step.op, step.target, args, kwargs, name)
        twin[step].meta = _moved(step.meta, first.path, call.path)
    results = {node: _standing_for(twin[node], like) for node, like in template.likes.items()}
    for position, node in template.renamed.items():
        _give_node(given[position], twin[node])
    known += ((node, twin[node]) for node in (*template.likes, *template.renamed.values()))
    _give_values(template.nodes, twin, known)
    leaves = [
        result[0]
        if isinstance(result, tuple)
        else results[result]
        if isinstance(result, fx.Node)
        else call.leaves[result]
        for result in template.results
    ]
    return tree_unflatten(leaves, template.tree)


def _again(
    asked: Asked, first: Call, call: Call, twin: dict[fx.Node, fx.Node]
) -> tuple[dict[fx.Node, fx.Node], list[torch.Tensor]]:
    """Its operators and their twins, which `twin` gets, and the tensors that it returned."""
    likes = [leaf for leaf in asked.leaves if isinstance(leaf, torch.Tensor)]
    given: list[torch.Tensor] = []
    for node, like in zip(asked.given, likes, strict=True):
        assert node is not None
        own = [x for x, theirs in zip(call.tensors, first.tensors, strict=True) if theirs is like]
        given.append(own[0] if own else _standing_for(twin[node], like))

    def number(place: Place) -> int:
        path, name = place
        found: int = vars(call.submodule(path))[name]
        return found

    made = asked_again(asked, call.helper, given, number, proxy_mode().tracer.graph, twin)
    if made is None:
        kind = type(call.helper).__name__
        raise CopyError(f"{kind}.{asked.name} does something else for {call.path}")
    for old, new in made[0].items():
        new.meta = {**_moved(old.meta, first.path, call.path), "val": new.meta.get("val")}
    with torch._C.DisableTorchFunction():
        for old_tensor, new_tensor in zip(asked.made_tensors, made[1], strict=True):
            if layout(old_tensor) != layout(new_tensor):
                raise CopyError(f"{asked.name} returns {layout(new_tensor)}")
    twin |= made[0]
    return made


def _standing_for(node: fx.Node, like: torch.Tensor) -> torch.Tensor:
    """A tensor that looks like another one, and has a node."""
    with outside_of_tracing(), torch._C.DisableTorchFunction():
        made = _made(like)
    _give_node(made, node)
    return made


def _give_node(tensor: torch.Tensor, node: fx.Node) -> None:
    tracer = proxy_mode().tracer
    with torch._C.DisableTorchFunction():  # each look at a tensor calls all modes
        track_tensor_tree(tensor, tracer.proxy(node), constant=None, tracer=tracer)


def _made(like: torch.Tensor) -> torch.Tensor:
    """A tensor that looks like another one, with memory of its own."""
    offset = int(like.storage_offset())
    room = like.detach()
    if offset:
        room = room.new_empty((offset + extent(like),))
    else:
        room = room.new_empty_strided(like.shape, like.stride())
    if like.requires_grad:
        room = room.requires_grad_().clone()  # a leaf could not be written into
    made = room.as_strided(like.shape, like.stride(), offset) if offset else room
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
        return on_memory(value, memory[place])

    with _disable_current_modes(), outside_of_tracing(), torch._C.DisableTorchFunction():
        for node, mine in known:
            pairs = zip(tensors(node.meta["val"]), tensors(mine.meta["val"]), strict=True)
            memory |= {storage_of(a): b.untyped_storage() for a, b in pairs}
        for node in nodes:
            if node not in done and "val" in node.meta:
                twin[node].meta["val"] = valued(node.meta["val"])

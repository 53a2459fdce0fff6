"""An object that layers are given and call, such as a cache of keys and values.

What a layer does with it is noted while the layer is traced. If it only calls methods, they are
called again for each copy of the layer: nothing is assumed of what they do, or keep, and where they
did something else there are no copies. What tells layers apart is in most of them a number
(`self.layer_idx`), which they hand to such a method and use for nothing else. That is seen, too:
instead of it a layer that is traced reads a `StandIn`, which notes every use, and is the number
itself where a method gets it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from ..answers.known import node_of, proxy_mode
from ..answers.number import How, Number
from ..effects.code import is_foreign_module
from ..tensors.fakes import FakeTensor
from ..tensors.pytree import TreeSpec, tree_flatten, tree_unflatten
from .kept import nameless
from .likeness import PLAIN, Place

_OWN = {"__getattribute__", "__getattr__", "__setattr__", "__delattr__", "__slots__"}
_NATIVE = (types.MethodDescriptorType, types.WrapperDescriptorType, types.BuiltinFunctionType)


def is_helper(value: object) -> bool:
    """Whether all that can be read of an object, or changed, is seen where it happens: it is of a
    class in Python, whose attributes are ordinary ones."""
    kind = type(value)
    if isinstance(value, (nn.Module, torch.Tensor)) or callable(value) or type(kind) is not type:
        return False
    classes = kind.__mro__[:-1]
    return bool(classes) and not any(
        is_foreign_module(each.__module__)
        or _OWN & vars(each).keys()
        or any(isinstance(member, _NATIVE) for member in vars(each).values())
        for each in classes
    )


class StandIn(Number):
    """Stands for a number that is an attribute of a layer.

    Args:
        used: is told when anything but handing it on becomes of it.
    """

    __slots__ = ("place",)

    def __init__(self, place: Place, value: int, used: Callable[[Place], object]):
        def ask(how: How) -> Any:
            used(place)
            return how(value)

        super().__init__(ask, value)
        self.place = place

    @property
    def number(self) -> int:
        """Without a note of it."""
        found: int = self._value
        return found


@dataclass(frozen=True)
class Asked:
    """A call of a method of the helper, while a layer was traced.

    Attributes:
        leaves: of the arguments, with stand-ins.
        given: nodes of the tensors among them.
        after: the node before the call; None for the graph's start.
        nodes: operators of the call.
        results: leaves of what it returned.
        made: nodes of the tensors among them.
    """

    name: str
    leaves: Sequence[Any]
    tree: TreeSpec
    given: Sequence[fx.Node | None]
    after: fx.Node | None
    nodes: Sequence[fx.Node]
    results: Sequence[Any]
    results_tree: TreeSpec
    made: Sequence[fx.Node | None]

    @property
    def made_tensors(self) -> list[torch.Tensor]:
        return _tensors(self.results)


class Watch:
    """What a layer does with a helper.

    Attributes:
        asked: calls of its methods, in order.
        other: whether anything else of it was read or changed.
    """

    def __init__(self, helper: object, graph: fx.Graph):
        self.asked: list[Asked] = []
        self.other = False
        self._helper, self._graph = helper, graph
        self._on = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The call of a layer inside."""
        kind: Any = type(self._helper)
        get, put, drop = kind.__getattribute__, kind.__setattr__, kind.__delattr__

        def read(each: Any, name: str) -> Any:
            if each is not self._helper or not self._on:
                return get(each, name)
            try:
                found = get(each, name)
            except AttributeError:
                self.other = True  # there may be one for the next layer
                raise
            if type(found) is types.MethodType and found.__self__ is each:
                return partial(self._call, name, found)
            self.other |= name != "__class__"
            return found

        def write(each: Any, name: str, value: Any) -> None:
            self.other |= each is self._helper and self._on
            put(each, name, value)

        def remove(each: Any, name: str) -> None:
            self.other |= each is self._helper and self._on
            drop(each, name)

        kind.__getattribute__, kind.__setattr__, kind.__delattr__ = read, write, remove
        self._on = True
        try:
            yield
        finally:
            self._on = False
            for name in ("__getattribute__", "__setattr__", "__delattr__"):
                delattr(kind, name)

    def _call(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves, tree = tree_flatten((args, kwargs))
        numbers = [each.number if type(each) is StandIn else each for each in leaves]
        args, kwargs = tree_unflatten(numbers, tree)
        if not self._on:  # it was kept, and is called by others
            return method(*args, **kwargs)
        self.other |= not all(_is_seen(each) for each in numbers)
        given = list(map(node_of, _tensors(leaves)))
        last = next(reversed(self._graph.nodes), None)
        self._on = False
        try:
            result = method(*args, **kwargs)
        finally:
            self._on = True
        results, results_tree = tree_flatten(result)
        self.other |= not all(_is_seen(each) for each in results)
        nodes, made = nodes_after(self._graph, last), list(map(node_of, _tensors(results)))
        asked = (name, leaves, tree, given, last, nodes, results, results_tree, made)
        self.asked.append(Asked(*asked))
        return result


def asked_again(
    asked: Asked,
    helper: object,
    given: Sequence[torch.Tensor],
    number: Callable[[Place], int],
    graph: fx.Graph,
    twin: Mapping[fx.Node, fx.Node],
) -> tuple[dict[fx.Node, fx.Node], list[torch.Tensor]] | None:
    """Call a method for another layer: what its operators are copies of, and the tensors that it
    returned; None if it did not do the same.

    Args:
        given: tensors among the arguments.
        number: what a stand-in stands for in that layer.
        twin: of nodes of the first layer those of the other one.
    """
    last = next(reversed(graph.nodes), None)
    tensors = iter(given)
    leaves = [
        number(each.place)
        if type(each) is StandIn
        else next(tensors)
        if isinstance(each, torch.Tensor)
        else each
        for each in asked.leaves
    ]
    args, kwargs = tree_unflatten(leaves, asked.tree)
    with nameless(proxy_mode().tracer):
        results, tree = tree_flatten(getattr(helper, asked.name)(*args, **kwargs))
    nodes = nodes_after(graph, last)
    if tree != asked.results_tree or len(nodes) != len(asked.nodes):
        return None
    both = {**twin, **dict(zip(asked.nodes, nodes, strict=True))}
    for old, new in zip(asked.nodes, nodes, strict=True):
        same = old.op == new.op and (old.op == "get_attr" or old.target == new.target)
        theirs = fx.node.map_arg((old.args, old.kwargs), both.__getitem__)
        if not same or theirs != (new.args, new.kwargs):
            return None
    for old, new in zip(asked.results, results, strict=True):
        if isinstance(old, torch.Tensor) != isinstance(new, torch.Tensor):
            return None
        if not isinstance(old, torch.Tensor) and (type(old) is not type(new) or old != new):
            return None
    made = _tensors(results)
    if [node_of(each) for each in made] != [both[each] for each in asked.made if each is not None]:
        return None
    return {old: both[old] for old in asked.nodes}, made


def nodes_after(graph: fx.Graph, last: fx.Node | None) -> list[fx.Node]:
    """Of a graph, in order."""
    found: list[fx.Node] = []
    for node in reversed(graph.nodes):
        if node is last:
            break
        found.append(node)
    return found[::-1]


def _is_seen(leaf: object) -> bool:
    return type(leaf) in PLAIN or type(leaf) is FakeTensor


def _tensors(leaves: Sequence[Any]) -> list[torch.Tensor]:
    return [each for each in leaves if isinstance(each, torch.Tensor)]

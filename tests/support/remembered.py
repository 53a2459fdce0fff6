"""The menus of units of the same graphs, worked out once per process: what is left of compiling
them once they are kept (`compiler.kept`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

from pipecompile.compiler.ir.graph import describe
from pipecompile.compiler.planning import cutter, planner
from pipecompile.compiler.planning import menus as menus_
from pipecompile.compiler.planning.stash import Body, Stash
from torch import fx

T = TypeVar("T")
Menus = list[tuple[Stash, ...]]
_NODES = ("recomputed", "exclusive", "shared", "forgets")  # of a stash


@contextmanager
def remembering() -> Iterator[None]:
    """Compile from memory where it is the same, in this process."""
    with mock.patch.object(planner, "options_of", _choosing(planner.options_of)):
        yield


def _choosing(options_of: Callable[..., Menus]) -> Callable[..., Menus]:
    known: dict[Hashable, list[list[dict[str, Any]]]] = {}

    def chosen(bodies: Sequence[Body], *told: Any) -> Menus:
        graph = bodies[0].forward[0].graph
        units = [[[node.name for node in part] for part in (b.forward, b.backward)] for b in bodies]
        limits = (cutter.MAX_OPTIONS, menus_.MAX_FORGETFUL)
        key = (_text(graph), repr(units), repr(told[1:]), limits)
        if key not in known:
            made = options_of(bodies, *told)
            known[key] = [[_named(each) for each in menu] for menu in made]
            return made
        nodes = {node.name: node for node in graph.nodes}
        return [tuple(_again(each, nodes) for each in menu) for menu in known[key]]

    return chosen


def _text(graph: fx.Graph) -> str:
    """Nodes with what they read and make."""
    return "\n".join(f"{n} {n.target} {n.args} {n.kwargs} {describe(n)}" for n in graph.nodes)


def _named(choice: Stash) -> dict[str, Any]:
    """With names for nodes, which are another graph's next time."""
    return vars(choice) | {
        field: frozenset(node.name for node in getattr(choice, field)) for field in _NODES
    }


def _again(fields: Mapping[str, Any], nodes: Mapping[str, fx.Node]) -> Stash:
    found = {field: frozenset(nodes[name] for name in fields[field]) for field in _NODES}
    return Stash(**{**fields, **found})

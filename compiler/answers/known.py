"""Real values of what is traced, as far as the batch at hand determines them.

torch.export records every operator in a graph of fx nodes. Those that are made of leaves of the
batch, constants and buffers alone are computed here, in the graph's order, beside the tracing.
Nothing of torch's says which node a traced tensor is, nor leaves a trace for a moment; what is
private in that is used in this file.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, _get_dispatch_mode_pre_dispatch
from torch.utils._python_dispatch import _disable_current_modes

from ..ir.graph import written
from ..tensors.facts import storage_of
from ..tensors.fakes import is_fake, is_symbol

Nodes = Sequence[fx.Node]


class _Unknown:
    """The value of what depends on more than the batch."""


_UNKNOWN = _Unknown()
_CHANCE = torch.Tag.nondeterministic_seeded


def proxy_mode() -> Any:
    """What records the operators that are being traced; None outside."""
    mode_of: Any = _get_dispatch_mode_pre_dispatch
    return mode_of(torch._C._TorchDispatchModeKey.PROXY)


@contextmanager
def untraced() -> Iterator[None]:
    """Operators inside run on real values, and leave nothing in the graph that is traced."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


class Known:
    """The nodes of one trace that have values.

    Args:
        given: the values of placeholders; they are copied, as operators may write over them.

    Attributes:
        order: what has been computed, one after the other.
    """

    def __init__(self, given: Mapping[fx.Node, torch.Tensor]):
        self.order: list[fx.Node] = []
        self._values: dict[fx.Node, Any] = {}
        self._tainted: set[int] = set()
        self._written: dict[fx.Node, set[int]] = {}
        with untraced():
            self._given = {node: value.detach().clone() for node, value in given.items()}

    def node(self, tensor: torch.Tensor) -> fx.Node | None:
        """Of a traced tensor that has a value."""
        node = node_of(tensor)
        if node is None:
            return None
        self._catch_up(node.graph)
        return node if self._is_known(node) else None

    def value(self, node: fx.Node) -> Any:
        return self._values[node]

    def needed(self, wanted: Nodes) -> tuple[list[fx.Node], bool]:
        """Of what was computed, in order, what these need; and whether any of it writes in place
        into what was given."""
        needed = set(wanted)
        spots = {spot for node in wanted for spot in _spots(self._values[node])}
        for node in reversed(self.order):
            if node in needed or self._written.get(node, set()) & spots:
                needed |= {node, *node.all_input_nodes}
                for each in (node, *node.all_input_nodes):
                    spots |= _spots(self._values[each])
        chosen = [node for node in self.order if node in needed]
        kept = (n for n in chosen if n.op in ("placeholder", "get_attr"))
        given = {spot for node in kept for spot in _spots(self._values[node])}
        return chosen, any(self._written.get(node, set()) & given for node in chosen)

    # -- computing ----------------------------------------------------------------------------

    def _catch_up(self, graph: fx.Graph) -> None:
        root = proxy_mode().tracer.root
        fresh = [node for node in graph.nodes if node not in self._values]
        with untraced():
            for node in fresh:
                value = self._values[node] = self._compute(node, root)
                if value is not _UNKNOWN:
                    self.order.append(node)

    def _compute(self, node: fx.Node, root: object) -> Any:
        if node.op == "placeholder":
            return self._given.get(node, _UNKNOWN)
        if node.op == "get_attr":
            value = getattr(root, str(node.target), None)
            if isinstance(value, torch.Tensor) and not is_fake(value):
                return value.detach().clone()
            return _UNKNOWN
        op: Any = node.target
        plain = _is_item(node) or is_symbol(node.meta.get("val"))  # and no operator
        if node.op != "call_function" or not (plain or isinstance(op, OpOverload)):
            return _UNKNOWN
        known = all(map(self._is_known, node.all_input_nodes))
        if known and _CHANCE not in getattr(op, "tags", ()):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
            try:
                self._written[node] = self._writes(node)
                return op(*args, **kwargs)
            except Exception:  # where one device raises too, or tracing does
                return _UNKNOWN
        self._tainted |= self._writes(node)
        return _UNKNOWN

    def _writes(self, node: fx.Node) -> set[int]:
        """Where in memory an operator writes."""
        return set().union(*(_spots(self._values[each]) for each in written(node)))

    def _is_known(self, node: fx.Node) -> bool:
        value = self._values.get(node, _UNKNOWN)
        return value is not _UNKNOWN and not self._tainted.intersection(_spots(value))


def node_of(tensor: torch.Tensor) -> fx.Node | None:
    """Of a tensor that is being traced."""
    mode = proxy_mode()
    proxy = None if mode is None else mode.tracer.unwrap_proxy(tensor)
    node = getattr(proxy, "node", None)
    return node if isinstance(node, fx.Node) else None


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _spots(value: Any) -> set[int]:
    """Where in memory a value is."""
    if isinstance(value, torch.Tensor):
        return {storage_of(value)}
    return set().union(*map(_spots, value)) if isinstance(value, (tuple, list)) else set()


def copied(nodes: Nodes, names: Mapping[fx.Node, str]) -> dict[fx.Node, fx.Node]:
    """Nodes -> their twins in a graph of these alone.

    Args:
        names: what placeholders are called in it.
    """
    graph = fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op == "placeholder":
            twin[node] = graph.placeholder(names[node])
        else:
            twin[node] = graph.node_copy(node, twin.__getitem__)
        twin[node].meta = {}
    return twin

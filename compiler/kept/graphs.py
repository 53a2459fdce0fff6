"""torch.fx graphs as JSON. Tensors with values go beside it, by names.

=============  =================================================================================
a value        in JSON
=============  =================================================================================
None, a bool,  itself
an int, a str
others         a list that begins with what it is: ``["node", 3]``, ``["float", "0x1.8p+1"]``,
               ``["tuple", ...]``, ``["fake", dtype, device, shape, stride]``
an operator    its name, ``aten.mul.Tensor``; it is looked up among torch's operators and our own,
               so that nothing in a file is run
=============  =================================================================================
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..ir.graph import Phase, is_operator
from ..tensors.facts import short_name
from ..tensors.fakes import FakeTensorMode, is_fake
from .identity import UntoldError

_SPACES = ("aten", "prims", "pipecompile")
_FUNCTIONS: dict[str, Callable[..., Any]] = {"operator.getitem": operator.getitem}
_META = ("val", "phase", "partner", "module")
"""What a node is known by; all that a graph has as it is captured."""

Json = Any
Nodes = Mapping[fx.Node, int]


def graph_in(graph: fx.Graph) -> tuple[list[Json], dict[fx.Node, int]]:
    """A graph as JSON, without its output, and the numbers of its nodes there.

    Raises:
        UntoldError: it has what no file has.
    """
    numbers: dict[fx.Node, int] = {}
    found: list[Json] = []
    values: dict[int, Json] = {}  # layers that are copies have the same ones
    for node in graph.nodes:
        if node.op == "output":
            continue
        meta = {}
        for key in _META:
            if key in node.meta:
                value = node.meta[key]
                if key == "val" and id(value) not in values:
                    values[id(value)] = value_in(value)
                meta[key] = values[id(value)] if key == "val" else value_in(value)
        if set(node.meta) - set(_META):
            raise UntoldError(f"{node.name}, of which more is known: {sorted(node.meta)}")
        args, kwargs = value_in(node.args, numbers), value_in(node.kwargs, numbers)
        found.append([node.op, node.name, _target_in(node), args, kwargs, meta])
        numbers[node] = len(numbers)
    return found, numbers


def graph_of(told: Sequence[Json], mode: FakeTensorMode | None) -> tuple[fx.Graph, list[fx.Node]]:
    """The graph again, and its nodes by their numbers.

    Args:
        mode: makes the tensors that stand for values; None where there are none.

    Raises:
        ValueError: it is no graph of ours.
    """
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    fakes = None if mode is None else _Fakes(mode)
    for op, name, target, args, kwargs, meta in told:
        if op not in ("placeholder", "get_attr", "call_function"):
            raise ValueError(f"a node that is a {op}")
        node = graph.create_node(
            op,
            _operator(target) if op == "call_function" else target,
            value_of(args, nodes),
            value_of(kwargs, nodes),
            name,
        )
        node.meta = {key: value_of(value, nodes, fakes) for key, value in meta.items()}
        nodes.append(node)
    return graph, nodes


def value_in(value: Any, numbers: Nodes | None = None) -> Json:
    """A value as JSON.

    Raises:
        UntoldError: it is none of those that graphs have.
    """
    for kinds, tell in _TELLS:
        if type(value) in kinds:
            return tell(value)
    if isinstance(value, fx.Node):
        return ["node", (numbers or {})[value]]
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, *(value_in(each, numbers) for each in value)]
    if isinstance(value, dict):
        return ["dict", *([str(k), value_in(v, numbers)] for k, v in value.items())]
    if isinstance(value, slice):
        ends = (value.start, value.stop, value.step)
        return ["slice", *(value_in(each, numbers) for each in ends)]
    if isinstance(value, torch.Tensor) and is_fake(value):
        like = short_name(value.dtype), str(value.device)
        sizes = [*value.size()], [*value.stride()]
        if all(isinstance(n, int) for each in sizes for n in each):
            return ["fake", *like, *sizes]
    raise UntoldError(f"a {type(value).__name__} in its graph")


def value_of(told: Json, nodes: Sequence[fx.Node] = (), fakes: _Fakes | None = None) -> Any:
    """The value again.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(told, list):
        return told
    kind, *rest = told
    if kind in ("list", "tuple"):
        values = (value_of(each, nodes, fakes) for each in rest)
        return list(values) if kind == "list" else tuple(values)
    if kind == "dict":
        return {key: value_of(each, nodes, fakes) for key, each in rest}
    if kind == "slice":
        return slice(*(value_of(each, nodes, fakes) for each in rest))
    if kind == "node":
        return nodes[rest[0]]
    if kind == "fake" and fakes is not None:
        return fakes.like(*rest)
    if kind not in _READS:
        raise ValueError(f"a value that is a {kind}")
    return _READS[kind](*rest)


class _Fakes:
    """Tensors without values; making one takes longer than all else that a node needs, so that
    those that are alike are one."""

    def __init__(self, mode: FakeTensorMode):
        self._mode = mode
        self._made: dict[str, torch.Tensor] = {}

    def like(
        self, dtype: str, device: str, size: Sequence[int], stride: Sequence[int]
    ) -> torch.Tensor:
        key = f"{dtype} {device} {size} {stride}"
        if key not in self._made:
            like = {"dtype": _of_torch(dtype, torch.dtype), "device": torch.device(device)}
            with self._mode:
                self._made[key] = torch.empty_strided(size, stride, **like)
        return self._made[key]


def constants_in(constants: nn.Module, tensors: dict[str, torch.Tensor]) -> Json:
    """The constants of a graph: their strides here, their elements among ``tensors``.

    Raises:
        UntoldError: one has no plain values.
    """
    found = {}
    for name, value in constants.named_buffers():
        if type(value) is not torch.Tensor or value.layout is not torch.strided:
            raise UntoldError(f"a constant that is a {type(value).__name__}")
        tensors[name] = value.detach().cpu().contiguous().clone()
        found[name] = [str(value.device), list(value.stride())]
    return found


def constants_of(told: Json, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The constants again."""
    made = nn.Module()
    for name, (device, stride) in told.items():
        value = tensors[name]
        whole = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=device)
        made.register_buffer(name, whole.copy_(value))
    return made


def _target_in(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if is_operator(node):
        name = str(node.target)
        if name.partition(".")[0] in _SPACES:
            return name
    for name, function in _FUNCTIONS.items():
        if node.target is function:
            return name
    raise UntoldError(f"{node.target}, which is none of torch's operators")


def _operator(name: str) -> Any:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    space, operation, overload = name.split(".")
    if space not in _SPACES:
        raise ValueError(f"an operator of {space}")
    return getattr(getattr(getattr(torch.ops, space), operation), overload)


def _of_torch(name: str, kind: type) -> Any:
    found = getattr(torch, name)
    if type(found) is not kind:
        raise ValueError(f"torch.{name} is no {kind.__name__}")
    return found


_TELLS: tuple[tuple[tuple[type, ...], Callable[[Any], Json]], ...] = (
    ((bool, int, str, type(None)), lambda value: value),
    ((float,), lambda value: ["float", value.hex()]),
    ((complex,), lambda value: ["complex", value.real.hex(), value.imag.hex()]),
    ((torch.dtype,), lambda value: ["dtype", short_name(value)]),
    ((torch.layout,), lambda value: ["layout", short_name(value)]),
    ((torch.memory_format,), lambda value: ["memory_format", short_name(value)]),
    ((torch.device,), lambda value: ["device", str(value)]),
    ((Phase,), lambda value: ["phase", value.value]),
)
_READS: dict[str, Callable[..., Any]] = {
    "float": float.fromhex,
    "complex": lambda real, imag: complex(float.fromhex(real), float.fromhex(imag)),
    "dtype": lambda name: _of_torch(name, torch.dtype),
    "layout": lambda name: _of_torch(name, torch.layout),
    "memory_format": lambda name: _of_torch(name, torch.memory_format),
    "device": torch.device,
    "phase": Phase,
}

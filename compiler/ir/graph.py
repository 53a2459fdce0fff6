"""The joint graph: forward, loss and backward of one microbatch in one flat torch.fx graph.

What is legal, and what every pass may rely on:

======================  ===================================================================
node                    meaning
======================  ===================================================================
placeholder             a parameter, a buffer, a leaf or a float of the batch, or the tangent of
                        the loss
get_attr                a constant tensor that the model made while it was captured
call_function           an ATen overload without side effect, or ``operator.getitem``
output                  loss, results, gradients and buffer updates, in the order of the fields
``meta["val"]``         a fake tensor: shape, strides and dtype (a tuple of them, an int, ...)
``meta["phase"]``       a `Phase`; a backward node is one that autograd added
``meta["partner"]``     the sequence number shared by a forward op and its backward nodes
``meta["recomputes"]``  in a backward node that computes a forward node again: its name
``meta["module"]``      dotted path of the module that was running ("" is the model itself)
``meta["region"]``      what a node does that runs a submodule eagerly (`ir.region.Work`)
======================  ===================================================================
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from ..tensors.facts import short_name
from .actions import Phase as Phase
from .ops import draws
from .region import alike


@dataclass
class JointGraph:
    """One microbatch's computation, with names for everything that enters and leaves it.

    Attributes:
        constants: holds the tensors that ``get_attr`` nodes name, as buffers.
        params: parameter FQN (of a tied group: the first name) -> placeholder.
        buffers: buffer FQN -> placeholder.
        inputs: index of a batch leaf -> placeholder; floats of the batch follow, and then what
            terms of the loss are multiplied by.
        tangent: placeholder of d(total)/d(loss), None in a graph without backward.
        loss: the scalar loss, None where only results are asked for.
        results: tensors the model returns, in pytree order (evaluation graphs).
        grads: parameter FQN -> its gradient.
        copies: parameter FQN -> placeholder of its copy in the compute dtype.
        mutations: buffer FQN -> its value after the forward pass.
    """

    constants: nn.Module
    graph: fx.Graph
    params: dict[str, fx.Node]
    buffers: dict[str, fx.Node]
    inputs: dict[int, fx.Node]
    tangent: fx.Node | None = None
    loss: fx.Node | None = None
    results: tuple[fx.Node, ...] = ()
    grads: dict[str, fx.Node] = field(default_factory=dict)
    copies: dict[str, fx.Node] = field(default_factory=dict)
    mutations: dict[str, fx.Node] = field(default_factory=dict)

    @property
    def owners(self) -> dict[fx.Node, str]:
        """Placeholder of a parameter or of its copy -> FQN."""
        pairs = (*self.params.items(), *self.copies.items())
        return {node: name for name, node in pairs}

    @property
    def copied_alone(self) -> set[str]:
        """Parameters of which the copy alone is read."""
        return {name for name in self.copies if not self.params[name].users}

    @property
    def used_constants(self) -> list[torch.Tensor]:
        """The constants of which not only the shape is read."""
        nodes = self.graph.find_nodes(op="get_attr")
        used = [node for node in nodes if not all(map(_reads_shape, node.users))]
        return [getattr(self.constants, str(node.target)) for node in used]

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""
        return self.tangent is not None

    def ops(self, phase: Phase | None = None) -> Iterator[fx.Node]:
        """The nodes that compute (constants included), in order; of one phase if given."""
        for node in self.graph.nodes:
            if node.op in ("call_function", "get_attr") and phase in (None, phase_of(node)):
                yield node

    def set_output(self) -> None:
        """Write the output node anew from the fields."""
        for node in self.graph.find_nodes(op="output"):
            self.graph.erase_node(node)
        loss = () if self.loss is None else (self.loss,)
        values = (*loss, *self.results, *self.grads.values(), *self.mutations.values())
        self.graph.output(values)

    def copy(self) -> tuple[JointGraph, dict[fx.Node, fx.Node]]:
        """Another graph with the same values in it, and each node's twin there."""
        made = fx.Graph()
        twin: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op != "output":
                twin[node] = made.node_copy(node, twin.__getitem__)
        copied = self.moved(made, twin)
        copied.set_output()
        return copied, twin

    def moved(self, made: fx.Graph, twin: Mapping[fx.Node, fx.Node]) -> JointGraph:
        """The same names for the values of another graph; its output is to be written."""
        return JointGraph(
            self.constants,
            made,
            {name: twin[node] for name, node in self.params.items()},
            {name: twin[node] for name, node in self.buffers.items()},
            {index: twin[node] for index, node in self.inputs.items()},
            None if self.tangent is None else twin[self.tangent],
            None if self.loss is None else twin[self.loss],
            tuple(twin[node] for node in self.results),
            {name: twin[node] for name, node in self.grads.items()},
            {name: twin[node] for name, node in self.copies.items()},
            {name: twin[node] for name, node in self.mutations.items()},
        )

    def text(self) -> str:
        """The graph as Python."""
        return str(self.graph.python_code("self").src)

    def fingerprint(self) -> str:
        """A hash that is equal on two ranks exactly when they captured the same graph."""
        digest = hashlib.sha256()
        index: dict[fx.Node, int] = {}
        looks: dict[int, str] = {}  # of values: layers that are copies have the same ones
        for node in self.graph.nodes:
            index[node] = len(index)
            value = node.meta.get("val")
            if id(value) not in looks:
                looks[id(value)] = describe(node)
            args = fx.node.map_arg(node.args, lambda n: f"%{index[n]}")
            kwargs = fx.node.map_arg(node.kwargs, lambda n: f"%{index[n]}")
            target = "" if node.op == "placeholder" else str(node.target)
            kwargs = {k: v for k, v in kwargs.items() if k != "device"}
            described = f"{node.op} {target} {args} {kwargs} {looks[id(value)]}\n"
            digest.update(alike(described).encode())
        named = (self.params, self.buffers, self.inputs, self.grads, self.copies)
        names = tuple(list(nodes) for nodes in named)
        digest.update(repr(names).encode())
        return digest.hexdigest()


def phase_of(node: fx.Node) -> Phase:
    phase = node.meta.get("phase", Phase.FORWARD)
    return phase if isinstance(phase, Phase) else Phase(phase)  # looked up for every operator


def module_of(node: fx.Node) -> str:
    return str(node.meta.get("module", ""))


def module_path(node: fx.Node) -> str:
    """The innermost module that made a node, below the traced function ("model" is the user's)."""
    modules = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return str(next(reversed(modules.values()))[0]) if modules else "model"


def identifier(name: str) -> str:
    """A parameter's or buffer's name as a Python name: ``0.weight`` becomes ``p_0_weight``."""
    plain = re.sub(r"\W", "_", name)
    return plain if plain.isidentifier() else f"p_{plain}"


def is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def is_operator(node: fx.Node) -> bool:
    """Whether a node calls an ATen overload. Its class has no public name; this is its home."""
    return isinstance(node.target, torch._ops.OpOverload)


def is_random(node: fx.Node) -> bool:
    """Whether the op draws from a generator, so that running it twice gives two answers.

    Attention kernels are tagged as such ops; without dropout they draw nothing.
    """
    return is_operator(node) and draws(node.target, node.args, node.kwargs)


def is_latest(node: fx.Node) -> bool:
    """Whether a node reads a buffer that forward updates: what it would read later is another value
    (`passes.graph.latest`)."""
    return "latest" in node.meta


def tensors(value: object) -> list[torch.Tensor]:
    """The tensors in a node's ``val``."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors(item)]
    return []


def nbytes(node: fx.Node) -> int:
    """Bytes of the tensors a node stands for, each counted dense."""
    return sum(t.numel() * t.element_size() for t in tensors(node.meta.get("val")))


def _reads_shape(node: fx.Node) -> bool:
    """Whether an operator makes a tensor like its operand, without its values."""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    return name.endswith("_like") or name.startswith("new_")


def describe(node: fx.Node) -> str:
    """Shape and dtype, like ``f32[4, 16, 64]``."""
    shown = [f"{_short(t.dtype)}{list(t.shape)}" for t in tensors(node.meta.get("val"))]
    return ", ".join(shown)


def _short(dtype: torch.dtype) -> str:
    name = short_name(dtype)
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i")):
        if name.startswith(long):
            return short + name.removeprefix(long)
    return name


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose memory a node's value lies in: itself unless it is a view.

    Keeping a view alive keeps its root alive, so bytes are counted by root.
    """
    while (source := viewed(node)) is not None:
        node = source
    return node


def viewed(node: fx.Node) -> fx.Node | None:
    """The node that a node is a view of, None if it has memory of its own."""
    if node.op != "call_function" or not node.args:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    if is_getitem(node):
        # an item of a view op's list aliases what the op viewed; of any other op it is its own
        return source if viewed(source) is not None else None
    return source if _is_view(node.target) else None


@cache
def _is_view(target: object) -> bool:
    """Whether what an operator returns lies in the memory of its first argument, unwritten."""
    if target in (torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default):
        return True
    schema = getattr(target, "_schema", None)
    alias = schema.returns[0].alias_info if schema is not None and schema.returns else None
    return alias is not None and not alias.is_write


def overwritten(node: fx.Node) -> fx.Node | None:
    """The node over whose value one of a program writes its own (`passes.programs.inplace`)."""
    schema = getattr(node.target, "_schema", None)
    for i, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            source = node.kwargs[argument.name] if argument.kwarg_only else node.args[i]
            assert isinstance(source, fx.Node)
            return source
    return None


def written(node: fx.Node) -> list[fx.Node]:
    """The operands that an operator writes into."""
    schema = getattr(node.target, "_schema", None)
    found: list[fx.Node] = []
    for i, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            fx.node.map_arg(given, found.append)
    return found


_PASSED_ON = {
    torch.ops.aten.detach.default: 0,
    torch.ops.aten.alias.default: 0,
    torch.ops.aten.slice.Tensor: 0,
    torch.ops.aten.slice_backward.default: 0,
    torch.ops.aten.slice_scatter.default: 1,
}
"""Operator -> which of its operands it returns, if that is of the same shape."""


def passed_on(node: fx.Node, shape: Callable[[Sequence[Any]], Any] = tuple) -> fx.Node | None:
    """The operand whose value a node has, as it takes all of its elements; None of other nodes.

    Args:
        shape: of a tensor's, what can be compared.
    """
    if node.target not in _PASSED_ON:
        return None
    source = node.args[_PASSED_ON[node.target]]
    assert isinstance(source, fx.Node)
    kept = [shape(each.meta["val"].shape) for each in (node, source)]
    return source if kept[0] == kept[1] else None


def behind(*wanted: fx.Node) -> list[fx.Node]:
    """All that some nodes are made of, themselves included, in the order of the graph."""
    found, pending = set(wanted), list(wanted)
    while pending:
        fresh = set(pending.pop().all_input_nodes) - found
        found |= fresh
        pending += fresh
    return sorted(found)


def made_of(
    wanted: fx.Node,
    allowed: Callable[[fx.Node], bool],
    given: Callable[[fx.Node], bool] = lambda _: False,
) -> list[fx.Node] | None:
    """All that a node is made of, itself the last, in order; None if any of it is not allowed.

    Args:
        given: whether it does not matter what a node is made of.
    """
    needed: set[fx.Node] = set()
    pending = [wanted]
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        if not allowed(node):
            return None
        needed.add(node)
        pending += () if given(node) else node.all_input_nodes
    return sorted(needed)


def computed(nodes: Iterable[fx.Node], values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """The values of nodes in order, on the CPU, added to those that are there."""
    for node in nodes:
        if node not in values:
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = dict(fx.node.map_arg(node.kwargs, values.__getitem__))
            if "device" in kwargs:
                kwargs["device"] = torch.device("cpu")
            target: Any = node.target
            values[node] = target(*args, **kwargs)
    return values


def root_bytes(nodes: Iterable[fx.Node]) -> int:
    """Bytes that keeping all of these values alive costs; what shares memory counts once."""
    return sum(nbytes(root) for root in dict.fromkeys(storage_root(node) for node in nodes))

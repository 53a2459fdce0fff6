"""Runs of operators of one layer become one call, which a backend compiles as a whole.

    native_layer_norm, addmm, mul, tanh, …      ->   call = self.fusion_3f2a91c0(add, weight, …)
                                                     mul_7 = call[0]; add_9 = call[1]

A fusion lies in one numbered module (``h.3``), or between them, so that its kernels do not reach
over the borders where stages and units end. Layers that are alike have fusions that are,
and these are one module: operators, literals, shapes, strides, dtypes and how values flow tell them
apart, and no names.

What stays outside: what is ours (gradients that are added to their slots, parameters that are
gathered), draws of random numbers, checks of values, operators that check indices (an error of the
batch is then theirs, as without fusions), submodules that run eagerly, and floats of the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import getitem
from typing import Any

import torch
from torch import fx, nn

from ...compiler.ir import ops
from ...compiler.ir.graph import (
    is_getitem,
    is_operator,
    is_random,
    module_of,
    storage_root,
    tensors,
    viewed,
)
from ...compiler.ir.program import (
    ANY_STRIDES,
    FUSION,
    BoxedCodeGen,
    PipelineProgram,
    Program,
    StageProgram,
    fusions_of,
    hand_over,
    on_demand,
)
from .inplace import functional
from .products import products_of

_ATEN = torch.ops.aten
_INDEXING = {
    "_embedding_bag",
    "_unsafe_index",
    "_unsafe_index_put",
    "embedding",
    "embedding_bag",
    "embedding_dense_backward",
    "gather",
    "index",
    "index_add",
    "index_copy",
    "index_fill",
    "index_put",
    "index_select",
    "nll_loss_forward",
    "nll_loss2d_forward",
    "put",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "take",
}
"""They say which index of a batch is out of range; those that add by index gain nothing either."""
_PRODUCTS = {"addmm", "baddbmm", "bmm", "convolution", "convolution_backward", "mm"}
"""Kernels of a library, whoever calls them: a run of these alone is no fusion."""
_DECOMPOSED = (
    "native_layer_norm",
    "_fused_rms_norm",
    "_softmax",
    "_log_softmax",
    "gelu",
    "silu",
    "_to_copy",
    "native_dropout",
)
"""What Inductor makes element-wise operators and reductions of; their backwards too."""
_ELEMENTWISE = {torch.Tag.pointwise, torch.Tag.reduction}
_TOLD_BY_DATA = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


@dataclass(frozen=True)
class Fused:
    """Programs with fusions.

    Attributes:
        calls: of fusions, in all programs.
        distinct: how many different ones there are.
    """

    program: PipelineProgram
    calls: int
    distinct: int

    def __str__(self) -> str:
        return f"{self.calls} fusions, {self.distinct} of them distinct"


def fuse(program: PipelineProgram) -> Fused:
    """Other programs, with the same arguments and results; those that are given stay."""
    known: dict[str, fx.GraphModule] = {}
    stages = tuple(fused_stage(stage, known) for stage in program.stages)
    parts = [part for stage in stages for part in stage.parts.values()]
    calls = sum(
        len(part.module.graph.find_nodes(op="call_module", target=name))
        for part in parts
        for name in fusions_of(part)
    )
    return Fused(replace(program, stages=stages), calls, len(known))


def fused_stage(stage: StageProgram, known: dict[str, fx.GraphModule]) -> StageProgram:
    """One stage's programs.

    Args:
        known: name -> fusion, of all stages; gets those that are new.
    """
    return stage.with_parts({part: _fused(code, known) for part, code in stage.parts.items()})


def _fused(program: Program, known: dict[str, fx.GraphModule]) -> Program:
    graph = fx.Graph()
    graph.set_codegen(BoxedCodeGen())
    graph.on_generate_code(lambda _: hand_over)
    root = nn.Module()
    for name, tensor in program.module.named_buffers():
        root.register_buffer(name, tensor)
    env: dict[fx.Node, fx.Node] = {}
    products = products_of(program.module.graph)
    absorbed = {node for product in products.values() for node in product.nodes}
    factors = {node for product in products.values() for node in product.reads}
    steps = list(_steps(program.module.graph, absorbed))
    inside = {node for step in steps if isinstance(step, list) for node in step}
    for step in steps:
        if isinstance(step, fx.Node):
            whole = products.get(step)
            env[step] = whole.emit(graph, env) if whole else _plain_copy(graph, step, env)
            continue
        made = _Fusion.of(step, inside, factors)
        fusion = known.setdefault(made.name, made.module)
        if not hasattr(root, made.name):
            root.add_module(made.name, fusion)
        call = graph.call_module(made.name, tuple(env[node] for node in made.inputs))
        call.meta["val"] = tuple(node.meta["val"] for node in made.outputs)
        call.meta["module"] = made.where
        for i, node in enumerate(made.outputs):
            env[node] = graph.create_node("call_function", getitem, (call, i), name=node.name)
            env[node].meta = dict(node.meta)
    return Program(on_demand(root, graph), program.inputs, program.outputs)


def _plain_copy(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    """A node in another graph; it writes over nothing, as what fusions return may share memory."""
    made = graph.node_copy(node, env.__getitem__)
    made.target, args, kwargs = functional(node)
    made.args = fx.node.map_arg(args, env.__getitem__)
    made.kwargs = fx.node.map_arg(kwargs, env.__getitem__)
    return made


# -- which operators ------------------------------------------------------------------------------


@dataclass
class _Run:
    """Operators that may become a fusion.

    Attributes:
        layer: the numbered module in which they are; "" for between these.
        after: what reads them and has no result, in order: put off until they are all done.
    """

    layer: str = ""
    nodes: dict[fx.Node, None] = field(default_factory=dict)
    after: list[fx.Node] = field(default_factory=list)

    def takes(self, node: fx.Node) -> bool:
        """Whether a node that can be in one belongs to it. Sums of gradients have no module, and
        belong to what they add."""
        if is_getitem(node):
            return node.args[0] in self.nodes
        if not self.nodes or layer_of(node) == self.layer:
            return True
        return not module_of(node) and not self.nodes.keys().isdisjoint(node.all_input_nodes)

    def steps(self) -> Iterator[fx.Node | list[fx.Node]]:
        """What becomes of it."""
        if _is_worthwhile(self.nodes):
            yield list(self.nodes)
        else:
            yield from self.nodes
        yield from self.after


def layer_of(node: fx.Node) -> str:
    """The outermost numbered module that a node is of; "" outside of these."""
    parts = module_of(node).split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: number + 1])


def _steps(graph: fx.Graph, absorbed: Collection[fx.Node]) -> Iterator[fx.Node | list[fx.Node]]:
    """The graph's nodes in an order in which each fusion's stand together, in a list.

    Args:
        absorbed: nodes that are left out, as what reads them makes them.
    """
    run = _Run()
    for node in _items_first(graph):
        if node in absorbed:
            continue
        if node.op in ("placeholder", "get_attr"):
            yield node
        elif node.target is ops.accumulate and run.nodes:
            run.after.append(node)
        elif _can_be_fused(node) and run.takes(node):
            run.nodes[node] = None
        else:
            yield from run.steps()  # the output ends the last
            run = _Run(layer_of(node))
            if _can_be_fused(node) and run.takes(node):
                run.nodes[node] = None
            else:
                yield node


def _items_first(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes in order, but items of a result right after it; before all arguments, some of which
    may have items."""
    given = graph.find_nodes(op="placeholder")
    yield from given
    done = set(given)
    for node in graph.nodes:
        pending = [node]
        while pending:
            each = pending.pop()
            if each in done:
                continue
            done.add(each)
            yield each
            pending += [user for user in reversed(list(each.users)) if is_getitem(user)]


def _can_be_fused(node: fx.Node) -> bool:
    if is_getitem(node):
        return True
    target, _, _ = functional(node)
    if not is_operator(node) or target.namespace != "aten" or is_random(node):
        return False
    if str(target._schema.name).removeprefix("aten::") in _INDEXING:
        return False
    if _TOLD_BY_DATA & set(target.tags) or target._schema.is_mutable:
        return False
    whole = isinstance(node.meta["val"], torch.Tensor) or all(map(is_getitem, node.users))
    given = all(_is_plain(source) for source in node.all_input_nodes)
    return whole and given and _is_plain(node)


def _is_plain(node: fx.Node) -> bool:
    """Whether a node stands for tensors that a backend knows."""
    found = tensors(node.meta.get("val"))
    return bool(found) and not any(t.is_complex() or t.is_quantized or t.is_sparse for t in found)


def _is_worthwhile(nodes: Sequence[fx.Node] | dict[fx.Node, None]) -> bool:
    """Whether there is anything to fuse."""
    computing = [n for n in nodes if not is_getitem(n) and viewed(n) is None]
    names = {str(functional(n)[0]).split(".")[1] for n in computing}
    return len(computing) > 1 and not names <= _PRODUCTS


def is_fusable(node: fx.Node) -> bool:
    """Whether an operator becomes a part of the kernels that read what it makes."""
    if node.op != "call_function" or is_getitem(node) or storage_root(node) is not node:
        return False
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return False
    name = str(packet).removeprefix("aten.")
    return bool(_ELEMENTWISE & set(node.target.tags)) or name.startswith(_DECOMPOSED)  # type: ignore[union-attr]


# -- what becomes of them -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fusion:
    """A run of nodes as a module of its own.

    Attributes:
        name: a hash of what it computes.
        inputs: the nodes outside that it reads, in order.
        outputs: those of its nodes that others read.
        where: the innermost module that all of them are in.
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    where: str

    @staticmethod
    def of(
        nodes: Sequence[fx.Node], fused: Collection[fx.Node], factors: Collection[fx.Node]
    ) -> _Fusion:
        """Args:
        fused: the nodes of all fusions of the program.
        factors: what is read by products that are none of its nodes.
        """
        inside = set(nodes)
        reads = [source for node in nodes for source in node.all_input_nodes]
        inputs = tuple(dict.fromkeys(source for source in reads if source not in inside))
        outputs = tuple(
            node for node in nodes if node in factors or not inside.issuperset(node.users)
        )
        graph = fx.Graph()
        graph.set_codegen(BoxedCodeGen())
        env: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate(inputs):
            env[node] = graph.placeholder(f"a{i}")
        for i, node in enumerate(nodes):
            target, args, kwargs = functional(node)
            args = fx.node.map_arg(args, env.__getitem__)
            kwargs = fx.node.map_arg(kwargs, env.__getitem__)
            env[node] = graph.create_node("call_function", target, args, kwargs, f"n{i}")
        for node, made in env.items():
            made.meta["val"] = node.meta["val"]
        for node in outputs:
            env[node].meta[ANY_STRIDES] = _any_strides(node, fused)
        graph.output(tuple(env[node] for node in outputs))
        name = FUSION + _digest(graph)
        return _Fusion(name, on_demand(nn.Module(), graph), inputs, outputs, _common(nodes))


def _any_strides(node: fx.Node, fused: Collection[fx.Node]) -> bool:
    """Whether a value is only added to sums of gradients, perhaps with others (a tied weight's)."""
    return all(
        user.target is ops.accumulate
        or (
            user not in fused
            and functional(user)[0] is _ATEN.add.Tensor
            and _any_strides(user, fused)
        )
        for user in node.users
    )


def _digest(graph: fx.Graph) -> str:
    """Of what a graph computes, whose nodes have the names of their places."""
    digest = hashlib.sha256()
    for node in graph.nodes:
        kwargs = {k: v.type if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}
        shapes = [
            (t.dtype, tuple(t.shape), t.stride(), t.device.type)
            for t in tensors(node.meta.get("val"))
        ]
        strides = node.meta.get(ANY_STRIDES, "")
        text = f"{node.op} {node.target} {node.args} {kwargs} {shapes} {strides}\n"
        digest.update(text.encode())
    return digest.hexdigest()[:12]


def _common(nodes: Sequence[fx.Node]) -> str:
    paths = [module_of(node).split(".") for node in nodes if module_of(node)]
    common: list[Any] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)

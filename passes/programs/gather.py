"""Parameters that replicas divide are whole for as long as a program reads them (ZeRO level 3).

A program gathers the parameters of a layer before its first operator, while the layer before
computes, and lets each go after the last operator that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import getitem

import torch
from torch import fx

from ...compiler.ir import ops
from ...compiler.ir.actions import Kind
from ...compiler.ir.program import (
    BoxedCodeGen,
    Group,
    PipelineProgram,
    Port,
    Program,
    Role,
    StageProgram,
    on_demand,
)
from ...compiler.ir.shards import Item, apart, parcels_of

_SHARDED = (Role.PARAM, Role.COPY)


def gather_parameters(program: PipelineProgram, dp: int) -> PipelineProgram:
    """Let every program fetch its parameters, layer by layer, each layer during the one before."""
    return replace(program, stages=tuple(_gathering(stage, dp) for stage in program.stages))


def _gathering(stage: StageProgram, dp: int) -> StageProgram:
    groups: list[Group] = []
    made = {part: _rewritten(code, dp, groups) for part, code in stage.parts.items()}
    return replace(
        stage,
        forward=made[Kind.F],
        backward=made.get(Kind.B),
        weight=made.get(Kind.W),
        groups=tuple(groups),
    )


def _rewritten(program: Program, dp: int, groups: list[Group]) -> Program:
    """A program that makes its parameters whole.

    Before a group's first reader stand ``unshard`` of it and ``gather`` of the next one. What the
    generated code lets go after its last reader is the parameter's memory.
    """
    nodes = list(program.module.graph.nodes)
    ports = dict(zip(nodes, program.inputs, strict=False))
    chosen = _groups(nodes, ports)
    if not chosen:
        return program
    graph = fx.Graph()
    graph.set_codegen(BoxedCodeGen())
    env: dict[fx.Node, fx.Node] = {}
    inputs: dict[Port, fx.Node] = {}
    for node, port in ports.items():
        if port.role not in _SHARDED:
            env[node] = inputs[port] = graph.node_copy(node)
    handles = []
    for members in chosen:
        handles.append(graph.placeholder(f"group_{len(groups)}"))
        inputs[Port(Role.GROUP, len(groups))] = handles[-1]
        groups.append(tuple(ports[member] for member in members))
    waiting = iter(zip(chosen, handles, strict=True))
    ticket = _gather(graph, next(waiting), dp, ports)
    for node in nodes[len(ports) :]:
        for source in node.all_input_nodes:
            if source not in env:
                members, handle, started = ticket
                env |= _unshard(graph, members, handle, started, dp)
                following = next(waiting, None)
                ticket = ticket if following is None else _gather(graph, following, dp, ports)
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], env.__getitem__))
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.lint()
    return Program(on_demand(program.module, graph), tuple(inputs), program.outputs)


def _groups(nodes: Sequence[fx.Node], ports: Mapping[fx.Node, Port]) -> list[list[fx.Node]]:
    """The parameters of each layer, in the order in which the layers are first read."""
    found: dict[str, dict[fx.Node, None]] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source in ports and ports[source].role in _SHARDED:
                found.setdefault(layer_of(str(ports[source].key)), {})[source] = None
    return [list(members) for members in found.values()]


def layer_of(name: str) -> str:
    """``h.3.attn.weight`` is in ``h.3``; ``wte.weight``, in no numbered module, in ``wte``."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: number + 1])


def _gather(
    graph: fx.Graph,
    group: tuple[list[fx.Node], fx.Node],
    dp: int,
    ports: Mapping[fx.Node, Port],
) -> tuple[list[fx.Node], fx.Node, fx.Node]:
    """Begin to fetch a group: a ticket as large as its parcels and the rows that are cast, and the
    parameters that need no parcel."""
    members, handle = group
    values = {member: member.meta["val"] for member in members}
    direct, rest = apart(values, dp)
    items = [Item("", tuple(value.shape), value.dtype) for value in rest.values()]
    size = sum(parcel.gather_bytes for parcel in parcels_of(items, dp, whole=True))
    size += sum(v.nbytes // dp for m, v in direct.items() if ports[m].role is Role.COPY)
    ticket = graph.call_function(ops.gather, (handle,))
    ticket.meta["val"] = (torch.empty(size, dtype=torch.uint8, device="meta"), *direct.values())
    ticket.meta["whole_bytes"] = sum(value.nbytes for value in values.values())
    return members, handle, ticket


def _unshard(
    graph: fx.Graph,
    members: Sequence[fx.Node],
    handle: fx.Node,
    ticket: fx.Node,
    dp: int,
) -> dict[fx.Node, fx.Node]:
    """Wait for a group: the node of each member."""
    direct, rest = apart({member: member.meta["val"] for member in members}, dp)
    whole = graph.call_function(ops.unshard, (handle, ticket))
    whole.meta["val"] = tuple(rest.values())
    made = {}
    for source, first, chosen in ((ticket, 1, direct), (whole, 0, rest)):
        for i, member in enumerate(chosen, first):
            made[member] = graph.create_node(
                "call_function", getitem, (source, i), name=member.name
            )
            made[member].meta["val"] = member.meta["val"]
    return made

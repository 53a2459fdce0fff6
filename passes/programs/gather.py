"""Parameters that replicas divide are whole for as long as a program reads them (ZeRO level 3).

A program gathers the parameters of a layer before its first operator, while the layer before
computes, and lets each go after the last operator that reads it. What a stage keeps whole over a
step (`StageProgram.kept`) is read as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import getitem

import torch
from torch import fx

from ...compiler.ir import ops
from ...compiler.ir.graph import storage_root
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
from ...compiler.ir.shards import Owners, apart, item_of, parcels_of
from ...compiler.ir.zero import layer_of

_SHARDED = (Role.PARAM, Role.COPY)


def gather_parameters(program: PipelineProgram, dp: int, owners: Owners) -> PipelineProgram:
    """Let every program fetch its parameters, layer by layer, each layer during the one before."""
    stages = tuple(_gathering(stage, dp, owners) for stage in program.stages)
    return replace(program, stages=stages)


def _gathering(stage: StageProgram, dp: int, owners: Owners) -> StageProgram:
    groups: list[Group] = []
    made = {
        part: _rewritten(code, dp, owners, groups, stage.kept.params)
        for part, code in stage.parts.items()
    }
    return replace(stage.with_parts(made), groups=tuple(groups))


def _rewritten(
    program: Program, dp: int, owners: Owners, groups: list[Group], kept: Collection[str]
) -> Program:
    """A program that makes its parameters whole, but for those that are kept.

    Before a group's first reader stand ``unshard`` of it and ``gather`` of the next one. What the
    generated code lets go after its last reader is the parameter's memory.
    """
    nodes = list(program.module.graph.nodes)
    ports = dict(zip(nodes, program.inputs, strict=False))
    sharded = {n for n, p in ports.items() if p.role in _SHARDED and str(p.key) not in kept}
    nodes = _late_views(nodes, ports, sharded)
    chosen = _groups(nodes, ports, sharded)
    if not chosen:
        return program
    graph = fx.Graph()
    graph.set_codegen(BoxedCodeGen())
    env: dict[fx.Node, fx.Node] = {}
    inputs: dict[Port, fx.Node] = {}
    for node, port in ports.items():
        if node not in sharded:
            env[node] = inputs[port] = graph.node_copy(node)
    handles = []
    for members in chosen:
        handles.append(graph.placeholder(f"group_{len(groups)}"))
        inputs[Port(Role.GROUP, len(groups))] = handles[-1]
        groups.append(tuple(ports[member] for member in members))
    waiting = iter(zip(chosen, handles, strict=True))
    fetch = partial(_gather, graph, dp=dp, owners=owners, ports=ports)
    ticket = fetch(*next(waiting))
    for node in nodes[len(ports) :]:
        for source in node.all_input_nodes:
            if source not in env:
                env |= _unshard(graph, *ticket)
                following = next(waiting, None)
                ticket = ticket if following is None else fetch(*following)
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], env.__getitem__))
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.lint()
    return Program(on_demand(program.module, graph), tuple(inputs), program.outputs)


def _late_views(
    nodes: Sequence[fx.Node], ports: Mapping[fx.Node, Port], sharded: Collection[fx.Node]
) -> list[fx.Node]:
    """The nodes in an order in which views of parameters are made right before they are read.

    A backward's views stand where the forward made them, before all layers, and would have all of
    these gathered at its start.
    """
    views = {node for node in nodes if node not in ports and storage_root(node) in sharded}
    found = dict.fromkeys(ports)
    for node in nodes[len(ports) :]:
        if node in views:
            continue
        behind = [source for source in node.all_input_nodes if source in views]
        chain: list[fx.Node] = []
        while behind:
            chain.append(behind.pop())
            behind += [source for source in chain[-1].all_input_nodes if source in views]
        found |= dict.fromkeys(sorted(chain))
        found[node] = None
    return list(found)


def _groups(
    nodes: Sequence[fx.Node], ports: Mapping[fx.Node, Port], sharded: Collection[fx.Node]
) -> list[list[fx.Node]]:
    """The parameters of each layer, in the order in which the layers are first read."""
    found: dict[str, dict[fx.Node, None]] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source in sharded:
                found.setdefault(layer_of(str(ports[source].key)), {})[source] = None
    return [list(members) for members in found.values()]


Values = dict[fx.Node, torch.Tensor]


def _gather(
    graph: fx.Graph,
    members: Sequence[fx.Node],
    handle: fx.Node,
    dp: int,
    owners: Owners,
    ports: Mapping[fx.Node, Port],
) -> tuple[fx.Node, fx.Node, Values, Values]:
    """Begin to fetch a group: a ticket as large as its parcels and the rows that are cast, and the
    parameters that need no parcel.

    Returns:
        ``handle``, the node that begins, the members without parcels and those in them.
    """
    values = {member: member.meta["val"] for member in members}
    owned = [member for member in members if ports[member].key in owners]
    direct, rest = apart(values, dp, owned)
    items = [item_of(str(ports[member].key), value, owners) for member, value in rest.items()]
    size = sum(parcel.gather_bytes for parcel in parcels_of(items, dp, whole=True))
    size += sum(v.nbytes // dp for m, v in direct.items() if ports[m].role is Role.COPY)
    ticket = graph.call_function(ops.gather, (handle,))
    ticket.meta["val"] = (torch.empty(size, dtype=torch.uint8, device="meta"), *direct.values())
    ticket.meta["whole_bytes"] = sum(value.nbytes for value in values.values())
    return handle, ticket, direct, rest


def _unshard(
    graph: fx.Graph, handle: fx.Node, ticket: fx.Node, direct: Values, rest: Values
) -> dict[fx.Node, fx.Node]:
    """Wait for a group: the node of each member."""
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

"""Nodes of a joint graph -> one program, with an argument for all that they read from outside."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...compiler.ir import ops
from ...compiler.ir.graph import JointGraph, identifier, is_random
from ...compiler.ir.locality import Locality
from ...compiler.ir.program import BoxedCodeGen, Port, Program, Role, on_demand


class Emitter:
    """Makes the programs of one graph.

    Attributes:
        ports: placeholder of the graph -> what it is in a program.
    """

    def __init__(self, graph: JointGraph, locality: Locality):
        self._graph, self._locality = graph, locality
        self._sites = {n: i for i, n in enumerate(n for n in graph.ops() if is_random(n))}
        self.ports = _placeholder_ports(graph)

    def program(
        self,
        nodes: list[fx.Node],
        outputs: list[tuple[Port, fx.Node]],
        slots: dict[fx.Node, list[str]],
    ) -> Program:
        """Copy nodes into a graph of their own; what they read from outside is an argument.

        Args:
            slots: node -> the parameters whose gradient it is: added up right after it is made.
        """
        graph = fx.Graph()
        graph.set_codegen(BoxedCodeGen())
        inside = set(nodes)
        reads = [a for node in nodes for a in node.all_input_nodes]
        reads += [node for _, node in outputs]
        inputs: dict[Port, fx.Node] = {}
        env: dict[fx.Node, fx.Node] = {}
        for node in dict.fromkeys(reads):
            if node not in inside:
                env[node] = inputs[self._port(node)] = graph.placeholder(node.name)
                env[node].meta["val"] = node.meta.get("val")
        for name in dict.fromkeys(name for node in nodes for name in slots.get(node, ())):
            slot = inputs[Port(Role.SLOT, name)] = graph.placeholder(f"slot_{identifier(name)}")
            slot.meta["val"] = self._graph.params[name].meta["val"]
        if any(is_random(node) for node in nodes):
            inputs[Port(Role.SEED)] = graph.placeholder("seed")
        for node in nodes:
            if is_random(node):
                draw: tuple[Any, ...] = (inputs[Port(Role.SEED)], self._sites[node], node.target)
                args = fx.node.map_arg(node.args, env.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
                env[node] = graph.create_node(
                    "call_function", ops.seeded, (*draw, *args), kwargs, node.name
                )
            else:
                env[node] = graph.node_copy(node, env.__getitem__)
            kept = ("val", "module", "region")
            env[node].meta = {key: node.meta[key] for key in kept if key in node.meta}
            for name in slots.get(node, ()):
                graph.call_function(ops.accumulate, (inputs[Port(Role.SLOT, name)], env[node]))
        graph.output(tuple(env[node] for _, node in outputs))
        graph.lint()
        module = on_demand(self._graph.constants, graph)
        return Program(module, tuple(inputs), tuple(port for port, _ in outputs))

    def _port(self, node: fx.Node) -> Port:
        if node in self.ports:
            return self.ports[node]
        return Port(Role.CONSTANT if node in self._locality.constant else Role.VALUE, node.name)


def _placeholder_ports(graph: JointGraph) -> dict[fx.Node, Port]:
    ports = {node: Port(Role.PARAM, name) for name, node in graph.params.items()}
    ports |= {node: Port(Role.COPY, name) for name, node in graph.copies.items()}
    ports |= {node: Port(Role.BUFFER, name) for name, node in graph.buffers.items()}
    ports |= {node: Port(Role.BATCH, index) for index, node in graph.inputs.items()}
    if graph.tangent is not None:
        ports[graph.tangent] = Port(Role.TANGENT)
    return ports

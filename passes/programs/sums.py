"""Gradients that are added to their sums without being made first, with the same bits.

    mm = aten.mm(xᵀ, g)
    accumulate(slot, mm)          ->    accumulate_product(slot, xᵀ, g)

    dense = aten.embedding_dense_backward(g, ids, …)
    accumulate(slot, dense)       ->    accumulate_rows(slot, g, ids, …)

Whether that has the same bits, and is faster, depends on the machine and on where a gradient goes:
so it is done to the programs of a rank when it gets them, and plans know nothing of it. What is
added is added where it was made, so that nothing is held longer, and in the order in which
gradients were added, which replicas go by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from ...compiler.ir import ops
from ...compiler.ir.program import BoxedCodeGen, Port, Program, hand_over, on_demand
from .products import Product, straight_products

_TABLE = torch.ops.aten.embedding_dense_backward.default


def with_sums(
    program: Program,
    alike: Callable[[Port, Product], bool],
    sparse: Callable[[Port, fx.Node], bool],
) -> Program:
    """A program with the same arguments and results; itself where there is nothing to do.

    Args:
        alike: whether a product is to be added to a slot while it is made.
        sparse: whether a table's gradient is to be added by rows.
    """
    source = program.module.graph
    nodes = list(source.nodes)
    ports = dict(zip(nodes, program.inputs, strict=False))
    at = {node: i for i, node in enumerate(nodes)}
    products = straight_products(source)
    made: dict[fx.Node, fx.Node] = {}  # what makes a gradient -> what adds it
    gone: set[fx.Node] = set()
    for add in source.find_nodes(op="call_function", target=ops.accumulate):
        slot, grad = add.args
        product = products.get(add)
        first = grad if product is None else product.made
        if any(node.target is ops.accumulate for node in nodes[at[first] + 1 : at[add]]):
            continue
        if product is not None and alike(ports[slot], product):
            gone |= {add, *product.nodes}
        elif _is_tables(grad) and sparse(ports[slot], grad):
            gone |= {add, grad}
        else:
            continue
        made[first] = add
    return _rewritten(program, made, gone, products) if made else program


def _is_tables(grad: fx.Node) -> bool:
    return grad.target is _TABLE and len(grad.users) == 1 and not grad.kwargs


def _rewritten(
    program: Program,
    made: dict[fx.Node, fx.Node],
    gone: set[fx.Node],
    products: dict[fx.Node, Product],
) -> Program:
    graph = fx.Graph()
    graph.set_codegen(BoxedCodeGen())
    graph.on_generate_code(lambda _: hand_over)
    env: dict[fx.Node, fx.Node] = {}
    for node in program.module.graph.nodes:
        if node in made and node.target is _TABLE:
            given = fx.node.map_arg((made[node].args[0], *node.args), env.__getitem__)
            graph.call_function(ops.accumulate_rows, given)
        elif node in made:
            products[made[node]].emit(graph, env)
        elif node not in gone:
            env[node] = graph.node_copy(node, env.__getitem__)
    return replace(program, module=on_demand(program.module, graph))

"""Gradients of weights that are products, added to their sums while they are made.

    mm = aten.mm(xᵀ, g); t = aten.t(mm)
    accumulate(slot, t)                     ->      accumulate_product(slot, gᵀ, x)

A library's kernel multiplies and adds in one pass over the sum; apart, the gradient is written,
read again, and copied first where it lies across. What is left out is the rounding in between, so
this is for backends whose bits are not promised, and for products that round alike either way
(`sums`). A fusion's product is left as it is where what it reads and the fusion makes is larger
than the gradient itself, which need not be held then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx

from ...compiler.ir import ops
from ...compiler.ir.graph import nbytes

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Factor:
    """A matrix that a product reads.

    Attributes:
        turned: whether it is the transpose of ``node``.
    """

    node: fx.Node
    turned: bool

    @property
    def value(self) -> torch.Tensor:
        value: torch.Tensor = self.node.meta["val"]
        return value.t() if self.turned else value

    def across(self) -> Factor:
        return Factor(self.node, not self.turned)

    def emit(self, graph: fx.Graph, made: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """The matrix in another graph."""
        source = made[self.node]
        if not self.turned:
            return source
        turned = graph.call_function(_ATEN.t.default, (source,))
        turned.meta["val"] = self.value
        return turned


@dataclass(frozen=True)
class Product:
    """What an ``accumulate`` adds.

    Attributes:
        made: the product as the graph has it.
        turned: whether it is the transpose of ``made`` that is added.
        nodes: ``made`` and transposes around it, which nothing else reads.
    """

    slot: fx.Node
    left: Factor
    right: Factor
    made: fx.Node
    turned: bool
    nodes: tuple[fx.Node, ...]

    @property
    def reads(self) -> tuple[fx.Node, fx.Node]:
        return self.left.node, self.right.node

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes, strides and dtypes of both, without data."""
        return self.left.value, self.right.value

    @property
    def held_bytes(self) -> int:
        """Of what it reads that the program makes."""
        return sum(nbytes(node) for node in self.reads if node.op != "placeholder")

    def emit(self, graph: fx.Graph, made: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Both in another graph, in the place of ``accumulate``."""
        factors = self.left.emit(graph, made), self.right.emit(graph, made)
        return graph.call_function(ops.accumulate_product, (made[self.slot], *factors))


def products_of(graph: fx.Graph) -> dict[fx.Node, Product]:
    """``accumulate`` -> the product that it can add, where no more has to be held for that."""
    return {
        add: product
        for add, product in _products(graph).items()
        if product.held_bytes <= nbytes(product.made)
    }


def straight_products(graph: fx.Graph) -> dict[fx.Node, Product]:
    """``accumulate`` -> the product that it adds as the graph has it, and not its transpose."""
    return {add: each for add, each in _products(graph).items() if not each.turned}


def _products(graph: fx.Graph) -> dict[fx.Node, Product]:
    adds = graph.find_nodes(op="call_function", target=ops.accumulate)
    found = {add: _product(*add.args) for add in adds}
    return {add: product for add, product in found.items() if product is not None}


def _product(slot: Any, gradient: Any) -> Product | None:
    chain: list[Any] = [gradient]
    while is_turn(chain[-1]):
        chain.append(chain[-1].args[0])
    turned = len(chain) % 2 == 0
    product = chain[-1]
    if product.target is not _ATEN.mm.default or any(len(node.users) > 1 for node in chain):
        return None
    left, right = (_factor(factor, chain) for factor in product.args)
    if turned:
        left, right = right.across(), left.across()
    return Product(slot, left, right, product, turned, tuple(chain))


def _factor(argument: Any, absorbed: list[fx.Node]) -> Factor:
    """Args:
    absorbed: gets the transposes that nothing else reads.
    """
    turned, alone = False, True
    while is_turn(argument):
        alone = alone and len(argument.users) == 1
        if alone:
            absorbed.append(argument)
        argument, turned = argument.args[0], not turned
    return Factor(argument, turned)


def is_turn(node: object) -> TypeGuard[fx.Node]:
    """Whether a node is the transpose of a matrix, which is its first argument."""
    if not isinstance(node, fx.Node) or node.meta["val"].dim() != 2:
        return False
    crossed = node.target is _ATEN.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    return crossed or node.target is _ATEN.t.default

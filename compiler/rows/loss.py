"""How the losses of microbatches make the loss of the batch, as numbers.

The loss of a batch is the sum over its microbatches of ``factor × loss``. The factor of a mean over
what is kept is ``count / total``, where the total is over all microbatches of all replicas; that of
a mean over rows is the share of rows; that of a sum is 1. What cannot be told has a plain mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import fx, nn

from ..ir.graph import JointGraph, behind
from ..ir.program import Port, Role
from .terms import Way


@dataclass(frozen=True)
class Counting:
    """The operators that count, from the leaves of a microbatch and buffers of the model."""

    module: fx.GraphModule
    inputs: tuple[Port, ...]

    @property
    def _dtypes(self) -> list[torch.dtype | None]:
        """As the operators read their inputs, which buffers may not be held in."""
        given = self.module.graph.find_nodes(op="placeholder")
        return [getattr(node.meta.get("val"), "dtype", None) for node in given]

    @torch.no_grad()
    def __call__(
        self, leaves: Sequence[torch.Tensor | float], buffers: Mapping[str, torch.Tensor]
    ) -> list[float]:
        """The counts of a microbatch, made on the host, where they are needed: a batch that is
        there must not wait for a device.

        Args:
            leaves: followed by the floats that its graph is given.
        """
        arguments = [
            buffers[str(port.key)].to("cpu", dtype)
            if port.role is Role.BUFFER
            else _on_host(leaves[int(port.key)])
            for port, dtype in zip(self.inputs, self._dtypes, strict=True)
        ]
        return [float(value) for value in self._here(*arguments)]

    @cached_property
    def _here(self) -> fx.GraphModule:
        """The operators on the host, wherever they were traced."""
        graph, constants = fx.Graph(), nn.Module()
        twin: dict[fx.Node, fx.Node] = {}
        for node in self.module.graph.nodes:
            made = twin[node] = graph.node_copy(node, twin.__getitem__)
            if "device" in made.kwargs:
                made.kwargs = {**made.kwargs, "device": torch.device("cpu")}
            if node.op == "get_attr":
                constants.register_buffer(str(node.target), getattr(self.module, node.target).cpu())
        return fx.GraphModule(constants, graph)


def _on_host(leaf: torch.Tensor | float) -> torch.Tensor | float:
    return leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf


def counting_of(graph: JointGraph, counts: Sequence[fx.Node]) -> Counting:
    """The operators that lead to some nodes of a graph, which no parameter has a part in."""
    ports = {node: Port(Role.BATCH, index) for index, node in graph.inputs.items()}
    ports |= {node: Port(Role.BUFFER, name) for name, node in graph.buffers.items()}
    made = fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    nodes = behind(*counts)
    inputs = [node for node in nodes if node.op == "placeholder"]
    for node in (*inputs, *(each for each in nodes if each.op != "placeholder")):
        twin[node] = made.node_copy(node, twin.__getitem__)
    made.output([twin[node] for node in counts])
    module = fx.GraphModule(graph.constants, made)
    return Counting(module, tuple(ports[node] for node in inputs))


@dataclass(frozen=True)
class Weighing:
    """What microbatches are weighed by in one term.

    Attributes:
        count: which of the counts; -1 for none.
        by: which of the counts is the number of the batch that a sum is divided by; -1 for none.
        floor, more, by_rows: as `Count` has them.
    """

    way: Way
    count: int = -1
    floor: float = 0.0
    more: float = 0.0
    by_rows: bool = False
    by: int = -1

    def misgiven(self, counts: Sequence[Sequence[float]]) -> tuple[float, float] | None:
        """Of a number that a sum is divided by, which is that of the global batch, two values that
        it cannot have both; of too small a one, and the labels that it should count.

        Args:
            counts: of all microbatches.
        """
        given = [each[self.by] for each in counts] if self.by >= 0 else []
        if not given:
            return None
        if min(given) != max(given):
            return min(given), max(given)
        kept = sum(each[self.count] for each in counts) if self.count >= 0 else 0.0
        return (given[0], kept) if 1 < given[0] < kept else None


@dataclass(frozen=True)
class LossForm:
    """Of what a loss is made.

    Attributes:
        terms: one, where the loss is weighed as a whole.
        factored: each term is multiplied in the graph by a share of its own, a further leaf of the
            batch; shares are 1 where all microbatches count as much.
        counting: None where nothing is counted.
        sizes: counts that the shape of a microbatch has; those that are counted follow them.
        note: what the plan says of it.
        warning: why it is another loss than that of the whole batch; "" where it is that.
    """

    terms: tuple[Weighing, ...] = (Weighing(Way.ROWS),)
    factored: bool = False
    counting: Counting | None = None
    sizes: tuple[float, ...] = ()
    note: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Weights:
    """What the microbatches of a step count, per replica and microbatch.

    Attributes:
        tangents: the gradient of the loss is multiplied by it, before the mean over replicas.
        shares: per term, what it is multiplied by; empty where terms have no shares of their own.
        factors: what losses are multiplied by before they are added; None for their plain mean.
    """

    tangents: list[list[float]]
    shares: list[list[list[float]]]
    factors: list[list[float]] | None

    def first(self, counts: Sequence[int]) -> Weights:
        """Those of so many first microbatches of each replica."""
        factors = self.factors and [f[:n] for f, n in zip(self.factors, counts, strict=True)]
        tangents = [t[:n] for t, n in zip(self.tangents, counts, strict=True)]
        shares = [s[:n] for s, n in zip(self.shares, counts, strict=True)]
        return Weights(tangents, shares, factors)

    @property
    def even(self) -> bool:
        """Whether plain accumulation over microbatches computes the same: no term counts another
        way than the loss does."""
        return all(share == 1.0 for replica in self.shares for each in replica for share in each)


def weights_of(form: LossForm, counts: Counts, rows: Sequence[Sequence[int]]) -> Weights:
    """What each microbatch counts.

    Args:
        counts: per replica and microbatch.
        rows: as many; a microbatch without rows counts nothing.

    Raises:
        ZeroDivisionError: nothing counts in any microbatch.
    """
    dp, sizes = len(rows), [len(replica) for replica in rows]
    flat = [each for replica in counts for each in replica]
    terms = [_factors(term, flat, [n for replica in rows for n in replica]) for term in form.terms]
    pieces = sum(n > 0 for replica in rows for n in replica)
    each = [[float(n > 0) / pieces for n in replica] for replica in rows]
    if form.factored:
        shares = [[share * pieces for share in many] for many in zip(*terms, strict=True)]
        factors = each
    else:
        shares = [[]] * sum(sizes)
        factors = _divided(terms[0], sizes)
    plain = all(factor == 1 / sum(sizes) for replica in factors for factor in replica)
    tangents = [[factor * dp for factor in replica] for replica in factors]
    return Weights(tangents, _divided(shares, sizes), None if plain else factors)


Counts = Sequence[Sequence[Sequence[float]]]
T = TypeVar("T")


def _divided(values: Sequence[T], sizes: Sequence[int]) -> list[list[T]]:
    rest = iter(values)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _factors(term: Weighing, counts: Sequence[Sequence[float]], rows: Sequence[int]) -> list[float]:
    """What each microbatch is multiplied by before all of them are added."""
    mine, amount = amounts(term, counts, rows)
    total = total_of(term, amount)
    return [each / total for each in mine]


def amounts(
    term: Weighing, counts: Sequence[Sequence[float]], rows: Sequence[int]
) -> tuple[list[float], float]:
    """What each microbatch counts, and what they amount to."""
    there = [float(n > 0) for n in rows]
    if term.way is Way.ROWS:
        return [float(n) for n in rows], float(sum(rows))
    if term.way is Way.KEPT:
        mine = [each[term.count] if n else 0.0 for each, n in zip(counts, rows, strict=True)]
        if term.by_rows:
            mine = [count * n for count, n in zip(mine, rows, strict=True)]
        pairs = zip(mine, there, strict=True)
        return [real * _divisor(term, count) for count, real in pairs], sum(mine)
    return there, sum(there)


def total_of(term: Weighing, amount: float) -> float:
    """What a sum of losses times what each counts is divided by."""
    if term.way is Way.SUM:
        return 1.0
    return _divisor(term, amount) if term.way is Way.KEPT else amount


def _divisor(term: Weighing, count: float) -> float:
    return max(count, term.floor) + term.more


def loss_of_replica(losses: torch.Tensor, weights: Weights, replica: int) -> torch.Tensor:
    """What the losses of a replica's microbatches make; those that count nothing may be NaN."""
    if weights.factors is None:
        return losses.mean()
    return _total(losses, weights.factors[replica])


def loss_of_batch(parts: torch.Tensor, weights: Weights, dtype: torch.dtype) -> torch.Tensor:
    """What those of the replicas make."""
    if weights.factors is None:
        return parts.to(dtype).mean()
    return parts.sum().to(dtype)


def loss_of_outputs(losses: torch.Tensor, weights: Weights) -> torch.Tensor:
    """What those of all microbatches make, which were weighed for these alone."""
    if weights.factors is None:
        return losses.mean()
    factors = [factor for replica in weights.factors for factor in replica]
    return _total(losses, factors).to(losses.dtype)


def _total(losses: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64, device=losses.device)
    for loss, factor in zip(losses.double(), factors, strict=True):
        if factor:
            total += factor * loss
    return total

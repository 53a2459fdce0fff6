"""How the outputs of microbatches become those of the whole batch; what cannot is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .terms import Way, terms_of
from .ways import How, Ways, grown, returned


@dataclass(frozen=True)
class Output:
    """One tensor of what the model returns.

    Attributes:
        name: its place in the structure.
        dim: along which rows are joined.
        why: why it cannot be joined.
    """

    name: str
    how: How
    dim: int = 0
    why: str = ""


LOSS = "loss"
"""The output that is the loss."""


def outputs_of(
    names: Sequence[str], single: fx.GraphModule, doubled: fx.GraphModule, cut: bool = False
) -> tuple[Output, ...]:
    """Per result of a forward.

    Args:
        names: of the results.
        single, doubled: the graph as exported, with as many rows and with twice as many.
        cut: a callable cuts batches, and not into rows.
    """
    pairs = list(zip(names, returned(single), returned(doubled), strict=False))
    dims = [grown(one, two, cut) for _, one, two in pairs]
    if not cut and all(len(each) == 1 for each in dims):
        return tuple(Output(n, How.ROWS, d) for n, (d,) in zip(names, dims, strict=True))
    ways = Ways(single, doubled, cut)
    return tuple(_output(ways, *pair) for pair in pairs)


def _output(ways: Ways, name: str, node: fx.Node, doubled: fx.Node) -> Output:
    dims = grown(node, doubled)
    if grown(node, doubled, ways.cut) != dims:
        why = "has other sizes in a piece than its part of the batch has"
        return Output(name, How.NONE, why=why)
    if len(dims) == 1:
        return Output(name, How.ROWS, dims[0])
    if dims:
        listed = " and ".join(map(str, dims))
        why = f"grows with the batch in dimensions {listed}: a microbatch has only a part of it"
        return Output(name, How.NONE, why=why)
    if name == LOSS:
        return Output(name, How.LOSS)
    how = ways.how.get(node, How.NONE)
    if how is How.MEAN and any(term.way is Way.KEPT for term in terms_of(ways, node)):
        why = "is a mean over what is kept, of which each microbatch may have another number"
        return Output(name, How.NONE, why=why)
    if how is How.MEAN and ways.cut:
        return Output(name, How.NONE, why="is a mean, and pieces have different numbers of it")
    if how is not How.NONE:
        return Output(name, how)
    why = "depends on the batch, but neither row by row nor as a mean or a sum over rows"
    return Output(name, How.NONE, why=why)


def joined(pieces: list[torch.Tensor], output: Output, sizes: Sequence[int]) -> torch.Tensor:
    """One output, which is not the loss, from those of the microbatches, all on one device.

    Args:
        sizes: the rows of each.
    """
    if len(pieces) == 1 or output.how is How.SAME:
        return pieces[0]
    if output.how is How.ROWS:
        return torch.cat(pieces, output.dim)
    total = torch.stack(pieces)
    if output.how is How.SUM:
        return total.sum(0)
    if len(set(sizes)) == 1:
        return total.mean(0)
    shares = torch.tensor(sizes, dtype=torch.float64, device=total.device) / sum(sizes)
    mean: torch.Tensor = torch.tensordot(shares, total.double(), dims=1)
    return mean.to(total.dtype)

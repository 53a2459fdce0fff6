"""A graph beside that of twice the rows: how values came about, also of a single row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pipecompile.compiler.rows.ways import How, Ways
from torch import fx, nn

WIDTH = 4


class Model(nn.Module):
    """Its positions are as wide as the batch, and labels are shifted, as transformers does both."""

    def __init__(self, loss: Callable[..., torch.Tensor]):
        super().__init__()
        self.table = nn.Embedding(8, WIDTH)
        self.loss = loss

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1]).unsqueeze(0)
        turned = self.table(places)
        if ids.shape[0] != 1:
            places = places.expand(ids.shape[0], -1)
        x, y = self.table(ids) * turned, self.table(places)
        return self.loss(x, y, ids[:, 1:].contiguous(), places)


def graph_of(loss: Callable[..., torch.Tensor], rows: int) -> fx.GraphModule:
    ids = torch.zeros((rows, 5), dtype=torch.long)
    return torch.export.export(Model(loss), (ids,), strict=False).module()  # type: ignore[return-value]


def result(ways: Ways) -> How:
    (end,) = ways.modules[0].graph.find_nodes(op="output")
    return ways.how[end.all_input_nodes[0]]


def shifted(x: torch.Tensor, y: torch.Tensor, labels: torch.Tensor, _: object) -> torch.Tensor:
    return (x + y)[:, :-1].mean() + labels.float().mean()


def summed(x: torch.Tensor, y: torch.Tensor, labels: torch.Tensor, _: object) -> torch.Tensor:
    return x.sum() + y.sum()  # the positions of as many rows as there are


@pytest.mark.parametrize("loss", [shifted, summed])
def test_one_row_is_compared_with_two(loss: Callable[..., torch.Tensor]) -> None:
    """What is not done of one row is copying and expanding."""
    one, two, four = (graph_of(loss, rows) for rows in (1, 2, 4))
    single, doubled = Ways(one, two), Ways(two, four)
    assert len(one.graph.nodes) < len(two.graph.nodes)
    assert result(single) is result(doubled) is (How.MEAN if loss is shifted else How.SUM)
    more = set(two.graph.nodes) - {node for node in single.twin.values() if node.op != "output"}
    twins = [node for node in doubled.how if node not in more]
    assert list(single.how.values()) == [doubled.how[node] for node in twins]


def test_what_sums_what_was_expanded_is_not_compared() -> None:
    """Of one row it sums that row, and of more as many of them: no node tells."""

    def summed(x: torch.Tensor, y: torch.Tensor, _: object, places: torch.Tensor) -> torch.Tensor:
        return x.sum() + y.sum() + places.sum()

    assert not Ways(graph_of(summed, 1), graph_of(summed, 2)).how


def test_what_is_expanded_of_the_batch_is_not_compared() -> None:
    def first(x: torch.Tensor, y: torch.Tensor, *_: object) -> torch.Tensor:
        means = x.mean(0, keepdim=True)
        means = means if x.shape[0] == 1 else means.expand(x.shape[0], -1, -1)
        return (means * y).sum()

    assert not Ways(graph_of(first, 1), graph_of(first, 2)).how


def test_what_is_written_into_is_not_compared() -> None:
    """Of one row the batch is changed, of two a copy."""

    def marked(x: torch.Tensor, y: torch.Tensor, labels: torch.Tensor, _: object) -> torch.Tensor:
        return (x + y).mean() + labels.float().mul_(2).mean() + labels.fill_(1).sum()

    assert not Ways(graph_of(marked, 1), graph_of(marked, 2)).how

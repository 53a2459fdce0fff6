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
        if ids.shape[0] != 1:
            places = places.expand(ids.shape[0], -1)
        return self.loss(self.table(ids), self.table(places), ids[:, 1:].contiguous(), places)


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
    assert [single.how[node] for node in single.how] == [doubled.how[node] for node in twins]


def test_what_is_read_as_one_row_too_is_not_compared() -> None:
    """Of the positions one row stands for all: what is made of that is another number."""

    def both(x: torch.Tensor, y: torch.Tensor, _: object, places: torch.Tensor) -> torch.Tensor:
        first = places if places.shape[0] == 1 else places._base
        assert first is not None
        return x.sum() + y.sum() + first.sum()

    assert not Ways(graph_of(both, 1), graph_of(both, 2)).how


def test_what_is_written_into_is_not_compared() -> None:
    """Of one row the batch is changed, of two a copy."""

    def marked(x: torch.Tensor, y: torch.Tensor, labels: torch.Tensor, _: object) -> torch.Tensor:
        return (x + y).mean() + labels.float().mul_(2).mean() + labels.fill_(1).sum()

    assert not Ways(graph_of(marked, 1), graph_of(marked, 2)).how

"""What microbatches return is joined to what one device returns for the batch, or refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.capture import batch as batches
from pipecompile.compiler.capture.capture import capture_forward
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.rows import ways
from pipecompile.compiler.rows.outputs import How
from support import jobs
from torch import nn

WIDTH = 8
CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self, output: Callable[[nn.Module, torch.Tensor], Any]):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.register_buffer("scale", torch.tensor(2.0))
        self.output = output

    def forward(self, x: torch.Tensor) -> Any:
        made = self.layers(x)
        return {"loss": made.square().mean(), "out": self.output(self, made)}


RIGHT: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "rows": lambda _, x: x,
    "rows in another dimension": lambda _, x: x.t(),
    "rows twice, one after the other": lambda _, x: (x[:, :3], [x.sum(1)]),
    "a mean": lambda _, x: x.mean(),
    "a mean, by parts": lambda _, x: x.mean(0).mean(),
    "a mean that is scaled": lambda model, x: 0.5 * x.abs().mean() * model.scale + 1,
    "a vector of means": lambda _, x: x.mean(0),
    "a sum": lambda _, x: x.sum(),
    "sums": lambda _, x: x.sum(0)[:2],
    "a sum of two": lambda _, x: (x.sum() + 2 * x.abs().sum()) / 3,
    "a sum over the number of rows": lambda _, x: x.sum() / x.shape[0],
    "a count": lambda _, x: (x > 0).sum(),
    "a loss by mean": lambda _, x: nn.functional.mse_loss(x, torch.zeros_like(x)),
    "a loss by sum": lambda _, x: nn.SmoothL1Loss(reduction="sum")(x, torch.zeros_like(x)),
    "what is alike in all": lambda model, x: model.scale * torch.arange(x.shape[1]),
}
REFUSED: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "all with all": lambda _, x: x @ x.t(),
    "the greatest": lambda _, x: x.max(),
    "a norm": lambda _, x: x.norm(),
    "the root of a mean": lambda _, x: x.square().mean().sqrt(),
    "a sum and a constant": lambda _, x: x.sum() + 1,
    "a mean and a sum": lambda _, x: x.mean() + x.sum(),
    "the number of rows": lambda _, x: torch.tensor(float(x.shape[0])),
    "a ratio of means": lambda _, x: x.mean() / x.abs().mean(),
    "features of features": lambda _, x: x.t() @ x,
}


def rows() -> torch.Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))


def compiled(output: Callable[[Any, torch.Tensor], Any], microbatches: int) -> Any:
    return pipecompile.compile(Model(output), 2, microbatches=microbatches, optimizer=jobs.SGD)


def every(kinds: dict[str, Callable[[Any, torch.Tensor], Any]], model: Any, x: torch.Tensor) -> Any:
    return {name: kind(model, x) for name, kind in kinds.items()}


def test_outputs_are_those_of_the_whole_batch() -> None:
    output = partial(every, RIGHT)
    found = compiled(output, 4).forward(rows())
    with torch.no_grad():
        expected = Model(output)(rows())
    torch.testing.assert_close(found, expected)  # sums over microbatches round in another order


def test_what_cannot_be_joined_is_told() -> None:
    spec = batches.flatten(rows())[1]
    spec = spec.with_rows(spec.rows // 4)
    skeleton = skeleton_of(Model(partial(every, REFUSED)), CPU)
    outputs = {each.name: each for each in capture_forward(skeleton, spec, CPU).outputs}
    assert outputs.pop("loss").how is How.LOSS
    assert "in dimensions 0 and 1" in outputs.pop("out.all with all").why
    assert {name.removeprefix("out.") for name in outputs} == REFUSED.keys() - {"all with all"}
    for each in outputs.values():
        assert "neither row by row nor as a mean or a sum" in each.why, each.name


def test_it_is_refused_by_name() -> None:
    output = REFUSED["all with all"]
    with torch.no_grad():
        expected = Model(output)(rows())
    torch.testing.assert_close(compiled(output, 1).forward(rows()), expected)
    message = "'out' from each of 4 microbatches .* compile with microbatches=1"
    with pytest.raises(pipecompile.errors.BatchError, match=message):
        compiled(output, 4).forward(rows())


def test_a_value_inside_of_vmap_has_no_place() -> None:
    """It may be where something else is."""
    found: list[int] = []

    def inner(row: torch.Tensor) -> torch.Tensor:
        found.append(ways._place(row))
        return row

    torch.func.vmap(inner)(torch.ones(2, 3))
    assert found == [ways.ANYWHERE]
    assert not ways._apart({7}, {ways.ANYWHERE})
    assert not ways._apart({ways.ANYWHERE}, {7})
    assert ways._apart(set(), {ways.ANYWHERE})
    assert ways._apart({7}, {8})

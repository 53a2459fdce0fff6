"""When a graph for all sizes is made, and for which batches it is used."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from pipecompile.compiler.capture import template
from support import jobs
from torch import nn

WIDTH, WORDS = 8, 16


class Masked(nn.Module):
    """Decides by a mask in the batch, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.embed(x)
        if not mask.all():
            states = states * mask[..., None] + states.cumsum(1)
        return self.head(states).square().mean()


def batch(rows: int, length: int, padded: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(length)
    mask = torch.ones(rows, length)
    if padded:
        mask[0, length // 2 :] = 0
    return {"x": torch.randint(WORDS, (rows, length)), "mask": mask}


@pytest.fixture
def traces() -> Iterator[list[bool]]:
    """Of every trace, whether it had symbols."""
    found, export = [], torch.export.export

    def exported(*args: Any, **options: Any) -> Any:
        found.append(options.get("dynamic_shapes") is not None)
        return export(*args, **options)

    with mock.patch.object(torch.export, "export", exported):
        yield found


def trained(batches: list[dict[str, torch.Tensor]], **options: Any) -> list[torch.Tensor]:
    pipe = pipecompile.compile(
        Masked(), 2, microbatches=1, optimizer=jobs.OPTIMIZERS["adamw"], **options
    )
    return [pipe.step(each) for each in batches]


def plainly(batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    model, losses = Masked(), []
    optimizer = jobs.OPTIMIZERS["adamw"](model.parameters())
    for each in batches:
        losses.append(model(**each))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return [loss.detach() for loss in losses]


def test_a_batch_that_answers_otherwise_has_a_graph_of_its_own(traces: list[bool]) -> None:
    """Of each answer one for all sizes, after what is traced to compare it with."""
    asked = [(6, False), (9, True), (12, True), (8, False), (5, True), (7, False), (11, True)]
    batches = [batch(4, length, padded) for length, padded in asked]
    assert all(map(torch.equal, trained(batches), plainly(batches)))
    assert traces.count(True) == 2
    assert traces.count(False) == 3


def test_another_graph_is_not_used(traces: list[bool]) -> None:
    """A graph for all sizes that is not that of the shape which was traced."""
    generalised = template.capture_template

    def wrong(*args: Any) -> Any:
        made = generalised(*args)
        joint = made.captured.graph
        node = next(n for n in joint.graph.nodes if n.target is torch.ops.aten.cumsum.default)
        node.target = torch.ops.aten.cumprod.default
        return made

    batches = [batch(4, length, padded=True) for length in (6, 9, 12)]
    with mock.patch("pipecompile.compiler.driver.builder.capture_template", wrong):
        assert all(map(torch.equal, trained(batches), plainly(batches)))
    assert traces.count(False) == 3


def test_errors_of_torch_are_no_errors_of_the_users() -> None:
    """Each shape is traced then, and it is said."""
    batches = [batch(4, length, padded=True) for length in (6, 9, 12)]
    broken = mock.Mock(side_effect=AssertionError("symbols"))
    with mock.patch.object(template, "differentiated_of", broken), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"traced one by one .*AssertionError: symbols"):
            trained(batches)
        warnings.simplefilter("ignore")
        assert all(map(torch.equal, trained(batches), plainly(batches)))


@pytest.mark.parametrize("precision", ["bf16", None])
def test_off_is_off(traces: list[bool], precision: str | None) -> None:
    batches = [batch(4, length, padded=False) for length in (6, 9, 12)]
    on, off = (trained(batches, precision=precision, dynamic=how) for how in ("auto", "off"))
    assert all(map(torch.equal, on, off))
    assert traces.count(True) == 1

"""When a graph for all sizes is made, and for which batches it is used."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from pipecompile.compiler.general import template
from pipecompile.errors import BatchError, MemoryBudgetError, OptionError
from support import jobs
from support.matrix import quickly
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
    with mock.patch("pipecompile.compiler.driver.capturing.capture_template", wrong):
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


@pytest.mark.parametrize("precision", quickly([None], ["bf16", None]))
def test_off_is_off(traces: list[bool], precision: str | None) -> None:
    batches = [batch(4, length, padded=False) for length in (6, 9, 12)]
    on, off = (trained(batches, precision=precision, dynamic=how) for how in ("auto", "off"))
    assert all(map(torch.equal, on, off))
    assert traces.count(True) == 1


def test_a_longer_batch_that_does_not_fit_is_refused() -> None:
    """Before it runs; batches that fit go on."""
    short, long = ({"x": batch(4, n, False)["x"], "mask": torch.ones(4, n)} for n in (6, 600))
    plan = pipecompile.compile(Masked(), 2, microbatches=1, example_batch=short).plan
    memory = 2 * max(stage.memory.peak for stage in plan.stages)
    pipe = pipecompile.compile(
        Masked(), 2, microbatches=1, memory=memory, optimizer=jobs.SGD, example_batch=short
    )
    with pytest.raises(MemoryBudgetError, match=r"x: int64\[4, 600\].* more than there is"):
        pipe.step(long)
    assert torch.equal(pipe.step(short), Masked()(**short).detach())
    with pytest.raises(MemoryBudgetError, match="Give the largest one as example_batch="):
        pipecompile.compile(
            Masked(), 2, microbatches=1, memory=memory, dynamic={"x": {1: (2, 600)}}
        ).compile_for(short)


@pytest.mark.parametrize(
    ("ranges", "length", "message"),
    [
        ({"x": {1: (4, 12)}}, 13, "'x' has size 13 in dimension 1, and dynamic= says 4 to 12"),
        ({"y": {1: (4, 12)}}, 9, "sizes of 'y' in dimension 1, which the batch"),
        ({"x": {2: (4, 12)}}, 9, "sizes of 'x' in dimension 2"),
    ],
)
def test_sizes_that_were_not_announced(ranges: Any, length: int, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        trained([batch(4, 6, False), batch(4, length, False)], dynamic=ranges)


def test_sizes_that_were_announced(traces: list[bool]) -> None:
    """The largest is compiled with the first one, and the mask follows the tokens."""
    batches = [batch(4, length, padded=False) for length in (6, 9, 12, 7)]
    losses = trained(batches, dynamic={"x": {1: (2, 12)}})
    assert all(map(torch.equal, losses, plainly(batches)))
    assert traces.count(True) == 1


class Limited(Masked):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 16:
            raise ValueError("at most 16 tokens")
        return super().forward(x, mask)


def test_sizes_that_the_model_does_not_take() -> None:
    pipe = pipecompile.compile(Limited(), 2, microbatches=1, dynamic={"x": {1: (2, 20)}})
    with pytest.raises(BatchError, match=r"announces .*x: int64\[4, 20\].*at most 16 tokens"):
        pipe.compile_for(batch(4, 6, padded=False))


class Placed(Masked):
    """With a table of so many positions, looked up as GPT-2 does."""

    def __init__(self, positions: int = 16) -> None:
        super().__init__()
        self.places = nn.Embedding(positions, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        return super().forward(x, mask) + self.places(at).square().mean()


def test_tables_of_positions_are_asked_before_anything_runs() -> None:
    pipe = pipecompile.compile(Placed(), 2, microbatches=1, dynamic={"x": {1: (2, 20)}})
    with pytest.raises(
        BatchError, match=r"announces .*x: int64\[4, 20\].*'places' would look up index 19 in .* 16"
    ):
        pipe.compile_for(batch(4, 6, padded=False))
    pipe = pipecompile.compile(Placed(), 2, microbatches=1, optimizer=jobs.SGD)
    loss = pipe.step(batch(4, 16, padded=False))
    with pytest.raises(BatchError, match="'places' would look up index 16 in a table of 16"):
        pipe.step(batch(4, 17, padded=False))
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    "given", ["on", {"x": 3}, {"x": {0: (1, 2)}}, {"x": {1: (3, 2)}}, {1: {1: (2, 3)}}, 5]
)
def test_what_is_no_range(given: Any) -> None:
    with pytest.raises(OptionError, match=r"dynamic=.* or ranges of sizes"):
        pipecompile.compile(Masked(), 2, dynamic=given)

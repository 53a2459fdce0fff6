"""Optimizers that the user makes: saved, or an error; of the wrong parameters, an error."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.errors import CheckpointError, OptionError
from support import plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn

ADAM = partial(torch.optim.Adam, lr=0.01)


def build() -> nn.Sequential:
    """Two stages of equal shapes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


def loss_fn(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return (output**2).mean()


loss_fn.traced_once = True  # type: ignore[attr-defined]


def rows(step: int) -> torch.Tensor:
    torch.manual_seed(step)
    return torch.randn(8, 6)


def compiled(model: nn.Module | None = None, n_stages: int = 2, dp: int = 1, **options: Any) -> Any:
    options = {"loss_fn": loss_fn, "microbatches": 2, "example_batch": rows(0)} | options
    return pipecompile.compile(model or build(), n_stages, dp, **options)


def optimizers(pipe: Any) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """One for matrices, one for vectors."""
    params = list(pipe.parameters())
    vectors = torch.optim.SGD([p for p in params if p.dim() < 2], lr=0.1, momentum=0.9)
    return ADAM([p for p in params if p.dim() > 1]), vectors


def train(pipe: Any, made: Any, first: int, last: int) -> list[torch.Tensor]:
    losses = []
    for step in range(first, last):
        losses.append(pipe.forward_backward(rows(step).chunk(pipe.data_shards)[pipe.data_shard]))
        for each in made:
            each.step()
        pipe.zero_grad()
    return losses


def begun(n_stages: int, dp: int, folder: Path | None, **options: Any) -> Any:
    """Three steps, saved, and three more."""
    pipe = compiled(None, n_stages, dp, **options)
    made = optimizers(pipe)
    train(pipe, made, 0, 3)
    if folder is not None:
        pipe.checkpoint_extras |= {"matrices": made[0], "vectors": made[1]}
        pipe.save(folder)
    return train(pipe, made, 3, 6), pipe.state_dict()


def resumed(n_stages: int, dp: int, folder: Path, **options: Any) -> Any:
    pipe = compiled(None, n_stages, dp, **options)
    made = optimizers(pipe)
    pipe.checkpoint_extras |= {"matrices": made[0], "vectors": made[1]}
    assert pipe.load(folder) == 3
    return train(pipe, made, 3, 6), pipe.state_dict()


@pytest.mark.slow
def test_two_optimizers_go_on_under_any_division(
    tmp_path: Path, gang: Callable[[int], Gang]
) -> None:
    """In a process for each stage, in one, and where replicas divide states."""
    expected = begun(1, 1, None)
    for found in gang(2).run(begun, 2, 1, tmp_path):
        assert plain.equal(found, expected)
    for found in gang(2).run(resumed, 2, 1, tmp_path):
        assert plain.equal(found, expected)
    assert plain.equal(resumed(2, 1, tmp_path), expected)
    assert plain.equal(resumed(1, 1, tmp_path), expected)
    two = resumed(1, 2, tmp_path, microbatches=1)
    for found in gang(2).run(resumed, 1, 2, tmp_path, zero=1, microbatches=1):
        assert plain.equal(found, two)


def test_an_optimizer_that_a_checkpoint_would_lack_is_refused(tmp_path: Path) -> None:
    pipe = compiled()
    made = optimizers(pipe)
    pipe.save(tmp_path)  # before any step there is nothing to lose
    train(pipe, made, 0, 1)
    with pytest.raises(CheckpointError, match="leave out the state of your Adam"):
        pipe.save(tmp_path)
    pipe.checkpoint_extras["matrices"] = made[0]
    with pytest.raises(CheckpointError, match=r"state of your SGD.*pipe.checkpoint_extras"):
        pipe.save(tmp_path)
    pipe.checkpoint_extras["vectors"] = None  # said to be meant
    pipe.save(tmp_path)
    del pipe.checkpoint_extras["vectors"]
    other = torch.optim.SGD(pipe.parameters(), lr=0.1)  # has no state
    train(pipe, [other], 1, 2)
    made = ()
    pipe.save(tmp_path)


def test_one_that_is_kept_inside_of_another_object_is_kept(tmp_path: Path) -> None:
    class Wrapped:
        def __init__(self, optimizer: torch.optim.Optimizer):
            self.optimizer = optimizer

        def state_dict(self) -> Any:
            return self.optimizer.state_dict()

    pipe = compiled()
    optimizer = ADAM(pipe.parameters())
    train(pipe, [optimizer], 0, 1)
    pipe.checkpoint_extras["all"] = Wrapped(optimizer)
    pipe.save(tmp_path)


def test_a_scheduler_does_not_keep_its_optimizer(tmp_path: Path) -> None:
    pipe = compiled()
    optimizer = ADAM(pipe.parameters())
    train(pipe, [optimizer], 0, 1)
    pipe.checkpoint_extras["rate"] = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(CheckpointError, match="leave out the state of your Adam"):
        pipe.save(tmp_path)
    pipe.checkpoint_extras["optimizer"] = optimizer
    pipe.save(tmp_path)


def test_the_pipelines_own_optimizer_needs_no_extras(tmp_path: Path) -> None:
    pipe = compiled(optimizer=ADAM)
    pipe.step(rows(0))
    pipe.save(tmp_path)
    own = ADAM(pipe.parameters())
    train(pipe, [own], 1, 2)
    with pytest.raises(CheckpointError, match="state of your Adam"):
        pipe.save(tmp_path)
    pipe.step(rows(2))  # has stepped everything since
    pipe.save(tmp_path)


class Count:
    """Of a rank."""

    def __init__(self, value: int):
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def counts(n_stages: int, dp: int, folder: Path, values: tuple[int, int] | None) -> Any:
    pipe = compiled(None, n_stages, dp, microbatches=1)
    rank = 0 if pipe.is_main else 1
    mine = pipe.checkpoint_extras["count"] = Count(values[rank] if values else -1)
    try:
        pipe.save(folder) if values else pipe.load(folder)
    except CheckpointError as error:
        return str(error)
    return mine.value


@pytest.mark.slow
def test_extras_that_differ_between_ranks(tmp_path: Path, gang: Callable[[int], Gang]) -> None:
    gang(2).run(counts, 2, 1, tmp_path / "apart", (3, 4))
    assert gang(2).run(counts, 2, 1, tmp_path / "apart", None) == [3, 4]
    says = r"checkpoint_extras['count'] had another state on each of the 2 ranks"
    for message in (*gang(2).run(counts, 1, 2, tmp_path / "apart", None),):
        assert message.startswith(says)
    assert counts(2, 1, tmp_path / "apart", None).startswith(says)
    gang(2).run(counts, 2, 1, tmp_path / "alike", (5, 5))
    assert gang(2).run(counts, 1, 2, tmp_path / "alike", None) == [5, 5]
    assert counts(2, 1, tmp_path / "alike", None) == 5


def counted(n_stages: int, dp: int, folder: Path, saves: bool) -> int:
    """What rank 0 alone has."""
    pipe = compiled(None, n_stages, dp, microbatches=1)
    mine = Count(7 if saves else -1)
    if pipe.is_main:
        pipe.checkpoint_extras["count"] = mine
    pipe.save(folder) if saves else pipe.load(folder)
    return mine.value


def test_an_extra_of_one_rank_goes_on_under_any_division(
    tmp_path: Path, gang: Callable[[int], Gang]
) -> None:
    gang(2).run(counted, 2, 1, tmp_path, True)
    assert gang(2).run(counted, 1, 2, tmp_path, False) == [7, -1]
    assert counted(2, 1, tmp_path, False) == 7


def test_extras_that_have_become_something_else(tmp_path: Path) -> None:
    pipe = compiled()
    optimizer = pipe.checkpoint_extras["it"] = ADAM(pipe.parameters())
    train(pipe, [optimizer], 0, 1)
    pipe.save(tmp_path / "optimizer")
    pipe.checkpoint_extras = {"it": Count(1), "left out": None}
    with pytest.raises(CheckpointError, match="was an optimizer of the pipeline's parameters"):
        pipe.load(tmp_path / "optimizer")
    pipe.save(tmp_path / "count")
    pipe.checkpoint_extras["it"] = optimizer
    with pytest.raises(CheckpointError, match="was something else when it was saved"):
        pipe.load(tmp_path / "count")
    pipe.checkpoint_extras["it"] = ADAM([*pipe.parameters(), nn.Parameter(torch.ones(2))])
    with pytest.raises(CheckpointError, match="has parameters of the pipeline and others"):
        pipe.save(tmp_path / "mixed")


# -- of the user's model ---------------------------------------------------------------------------


@pytest.mark.parametrize("n_stages", quickly([2], [1, 2]))
def test_an_optimizer_of_the_users_model_is_refused(n_stages: int) -> None:
    model = build()
    pipe = compiled(model, n_stages)
    optimizer = ADAM(model.parameters())
    pipe.forward_backward(rows(0))
    with pytest.raises(OptionError, match=r"the Adam has stepped.*pipe.parameters\(\)"):
        optimizer.step()
    train(pipe, [ADAM(pipe.parameters())], 0, 2)


def test_the_users_model_may_be_trained_beside_the_pipeline() -> None:
    model = build()
    pipe = compiled(model)
    mine, theirs = ADAM(pipe.parameters()), ADAM(model.parameters())
    theirs.step()  # of no gradients, while the pipeline has none
    for step in range(2):
        pipe.forward_backward(rows(step))
        pieces = [loss_fn(model(piece), piece) for piece in rows(step).chunk(2)]
        for each in pieces:
            (each / 2).backward()
        theirs.step()
        mine.step()
        theirs.zero_grad()
        pipe.zero_grad()
    assert plain.equal(pipe.state_dict(), dict(model.state_dict()))


def test_pipelines_that_are_gone_are_not_asked() -> None:
    model = build()
    pipe = compiled(model)
    pipe.forward_backward(rows(0))
    del pipe
    gc.collect()
    ADAM(model.parameters()).step()

"""Another training with the same programs, and parts of the state that are given new values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.errors import OptionError, StateError
from support import plain
from support.gang import Gang
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR

BATCH = {"x": torch.linspace(-1, 1, 64).view(8, 8)}


class Masked(nn.Module):
    """Dropout, a mask that is a buffer and one that a constant is made of, and a batch norm."""

    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("mask", torch.ones(8, 8))
        self.register_buffer("kept", torch.ones(8, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.drop(self.norm(self.first(x))).relu()
        x = nn.functional.linear(x, self.second.weight * self.mask, self.second.bias)
        x = x * self.kept.float()
        return {"loss": x.square().mean(), "logits": x}


def compiled(dp: int = 1, **options: Any) -> pipecompile.Pipeline:
    torch.manual_seed(0)
    options = {"optimizer": partial(AdamW, lr=0.1), "seed": 3, "example_batch": BATCH} | options
    return pipecompile.compile(Masked(), 2, dp, microbatches=2, **options)


def mine(pipe: pipecompile.Pipeline) -> dict[str, torch.Tensor]:
    return {"x": BATCH["x"].chunk(pipe.data_shards)[pipe.data_shard]}


def steps(pipe: pipecompile.Pipeline) -> list[torch.Tensor]:
    return [pipe.step(mine(pipe)) for _ in range(3)]


# -- another training ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [None, "fp16"])
def test_it_is_as_a_pipeline_that_was_just_compiled(precision: str | None) -> None:
    """Weights, buffers, optimizer, scheduler, dropout, loss scale: all of it begins anew."""
    halving = partial(StepLR, step_size=1, gamma=0.5)
    pipe, other = compiled(precision=precision), None
    start, programs = pipe.state_dict(), pipe.programs
    first = steps(pipe)
    pipe.restart(start)
    with pytest.raises(StateError, match="before a step has ended"):
        _ = pipe.metrics
    assert steps(pipe) == first
    pipe.restart(start, optimizer=partial(AdamW, lr=0.01), lr_scheduler=halving)
    other = compiled(optimizer=partial(AdamW, lr=0.01), lr_scheduler=halving, precision=precision)
    found = steps(pipe)
    assert found == steps(other) != first
    assert plain.equal(pipe.state_dict(), other.state_dict())
    assert pipe.get_lr() == other.get_lr()
    assert pipe.programs is programs


def test_gradients_that_wait_are_dropped() -> None:
    pipe = compiled()
    start = pipe.state_dict()
    pipe.forward_backward(BATCH)
    pipe.restart(start)
    assert all(param.grad is None for param in pipe.parameters())


def test_what_does_not_fit_changes_nothing() -> None:
    pipe = compiled()
    start = pipe.state_dict()
    pipe.step(BATCH)
    before, optimizer = pipe.state_dict(), pipe.optimizer
    with pytest.raises(OptionError, match="planned for AdamW, and optimizer= makes SGD"):
        pipe.restart(start, optimizer=partial(SGD, lr=0.1))
    with pytest.raises(StateError, match="missing"):
        pipe.restart({"mask": torch.ones(8, 8)})
    with pytest.raises(OptionError, match="no attribute"):
        pipe.restart(start, lr_scheduler=lambda optimizer: optimizer.nothing)
    assert pipe.optimizer is optimizer
    assert plain.equal(pipe.state_dict(), before)


# -- parts of the state -------------------------------------------------------------------------


def _masks() -> dict[str, torch.Tensor]:
    return {"mask": torch.eye(8), "kept": torch.arange(8) < 4, "second.bias": torch.ones(8)}


def test_parts_take_effect() -> None:
    """In training and evaluation, also where a constant was made of a buffer."""
    pipe, model = compiled(), Masked()
    pipe.step(BATCH)
    pipe.forward(BATCH)
    before = pipe.state_dict()
    pipe.load_state_dict(_masks(), strict=False)
    after = pipe.state_dict()
    assert plain.equal(after, before | _masks())
    model.load_state_dict(after)
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model(rows)["logits"] for rows in BATCH["x"].chunk(2)])
    assert torch.equal(pipe.forward(BATCH)["logits"], expected)
    pipe.forward_backward(BATCH)
    grads = {name: param.grad for name, param in pipe.named_parameters()}
    assert not grads["second.bias"][4:].any()
    assert not grads["second.weight"][~torch.eye(8, dtype=torch.bool)].any()


def test_unknown_parts_are_refused() -> None:
    pipe = compiled()
    before = pipe.state_dict()
    keys = pipe.load_state_dict({"masks": torch.eye(8)}, strict=False)
    assert keys.unexpected_keys == ["masks"]
    assert plain.equal(pipe.state_dict(), before)
    for given in ({"mask": torch.eye(4)}, _masks() | {"kept": "all"}):
        with pytest.raises(StateError):
            pipe.load_state_dict(given, strict=False)
        assert plain.equal(pipe.state_dict(), before)
    with pytest.raises(StateError, match="missing"):
        pipe.load_state_dict(_masks())


def divided(zero: int) -> bool:
    """On each of four ranks, of which some may have no parameters: parts, and another training."""
    pipe = compiled(2, zero=zero, example_batch=None)
    pipe.compile_for(mine(pipe))
    start = pipe.state_dict()
    first = steps(pipe)
    pipe.load_state_dict(_masks(), strict=False)
    after = pipe.state_dict()
    expected = all(torch.equal(after[name], value) for name, value in _masks().items())
    pipe.restart(start)
    return expected and steps(pipe) == first


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_in_processes(gang: Callable[[int], Gang], zero: int) -> None:
    assert gang(4).run(divided, zero) == [True] * 4

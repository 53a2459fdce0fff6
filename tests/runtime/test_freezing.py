"""Which parameters train is settled by compiling: another ``requires_grad`` is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.errors import CaptureError
from support import plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn

ADAM = partial(torch.optim.Adam, lr=0.1)


def build(frozen: str = "") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    for name, param in model.named_parameters():
        param.requires_grad_(name != frozen)
    return model


def loss_fn(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return (output**2).mean()


def compiled(frozen: str = "", n_stages: int = 2, dp: int = 1, **options: Any) -> Any:
    options |= {"optimizer": ADAM, "loss_fn": loss_fn, "microbatches": 2, "example_batch": batch()}
    return pipecompile.compile(build(frozen), n_stages, dp, **options)


def batch() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(8, 4)


def switched(
    frozen: str, name: str, n_stages: int = 2, dp: int = 1, **options: Any
) -> tuple[str, bool]:
    """What the next step says where one parameter's flag is the other one, and whether the step
    after it is back is that of a run in which nothing happened."""
    pipe, other = (compiled(frozen, n_stages, dp, **options) for _ in range(2))
    rows = batch().chunk(pipe.data_shards)[pipe.data_shard]
    pipe.step(rows)
    other.step(rows)
    mine = [param for key, param in pipe.named_parameters() if key == name]
    for param in mine:
        param.requires_grad_(not param.requires_grad)
    pipe.evaluate(rows)  # needs no gradient
    message = ""
    try:
        pipe.step(rows)
    except CaptureError as error:
        message = str(error)
    for param in mine:
        param.requires_grad_(not param.requires_grad)
    same = torch.equal(pipe.step(rows), other.step(rows))
    return message, same and plain.equal(pipe.state_dict(), other.state_dict())


CASES = [("", "0.weight", "False and was compiled as trained")]
CASES += [("4.bias", "4.bias", "True and was compiled as frozen")]


@pytest.mark.parametrize(("frozen", "name", "says"), CASES)
@pytest.mark.parametrize("n_stages", quickly([2], [1, 2]))
def test_another_flag_is_refused(n_stages: int, frozen: str, name: str, says: str) -> None:
    message, goes_on = switched(frozen, name, n_stages)
    assert message.startswith(f"parameter '{name}' has requires_grad={says}")
    assert goes_on


@pytest.mark.slow
@pytest.mark.parametrize(("frozen", "name", "says"), CASES)
def test_every_rank_refuses_it(
    gang: Callable[[int], Gang], frozen: str, name: str, says: str
) -> None:
    """Also those that do not hold the parameter, or are replicas of the one that does."""
    for found in (
        gang(2).run(switched, frozen, name),
        gang(2).run(switched, frozen, name, 1, 2, zero=3),
    ):
        for message, goes_on in found:
            assert message.startswith(f"parameter '{name}' has requires_grad={says}")
            assert goes_on


def test_a_checkpoint_goes_on_under_other_flags(tmp_path: Path) -> None:
    """As the error says: those that train on keep their optimizer's states."""
    model = build()
    optimizer = ADAM(model.parameters())
    pipe = compiled()
    for step in range(4):
        if step == 2:
            pipe.save(tmp_path)
            pipe = compiled("0.weight")
            pipe.load(tmp_path)
            model[0].weight.requires_grad_(False)
        pieces = [loss_fn(model(piece), piece) for piece in batch().chunk(2)]
        for each in pieces:
            (each / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(pipe.step(batch()), torch.stack(pieces).mean())
    assert plain.equal(pipe.state_dict(), dict(model.state_dict()))

"""Optimizers of all kinds train on stages and replicas as on one device, or are refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.ir.errors import OptionError
from support import jobs, models, optimizers
from torch import nn

# -- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [optimizers.Prodigy, optimizers.Clipping, torch.optim.LBFGS])
@pytest.mark.parametrize(
    ("n_stages", "dp", "zero", "said"),
    [(2, 1, 0, "n_stages=2"), (1, 2, 3, "zero=3"), (2, 2, "auto", "n_stages=2 and zero=auto")],
)
def test_one_state_for_all_parameters_cannot_be_divided(
    kind: Any, n_stages: int, dp: int, zero: Any, said: str
) -> None:
    """Before anything starts, and not at the first batch."""
    with pytest.raises(
        OptionError, match=rf"{kind.__name__} does not go with {said}: .*n_stages=1"
    ):
        pipecompile.compile(models.build("gpt2"), n_stages, dp, zero=zero, optimizer=kind)


def test_one_state_for_all_parameters_on_one_stage() -> None:
    """Replicas that hold everything step alike; "auto" divides nothing, and takes one stage."""
    batch = models.batches("gpt2", 8, 1)[0]
    made = [
        jobs.pipeline("gpt2", 1, 2, 2, optimizer=optimizers.Prodigy, zero=zero, example_batch=batch)
        for zero in (0, "auto")
    ]
    assert [pipe.plan.options["zero"] for pipe in made] == ["0", "0"]
    auto = pipecompile.compile(
        models.build("gpt2"),
        "auto",
        devices=2,
        example_batch=batch,
        optimizer=optimizers.Prodigy,
        device="cpu",
    )
    assert (auto.plan.n_stages, auto.plan.dp) == (1, 2)
    with pytest.raises(OptionError, match="max_grad_norm="):
        pipecompile.compile(nn.Sequential(nn.Linear(2, 2)), 2, optimizer=optimizers.Clipping)


def test_what_is_made_from_parameters_is_not_tried() -> None:
    batch = models.batches("gpt2", 8, 1)[0]
    pipe = jobs.pipeline("gpt2", 2, 1, 2, optimizer=None, example_batch=batch)
    optimizer = optimizers.Clipping(pipe.parameters())
    pipe.forward_backward(batch)
    optimizer.step()
    with pytest.raises(OptionError, match="Clipping"):
        jobs.pipeline("gpt2", 2, 1, 2, optimizer=partial(optimizers.Clipping, lr=0.1))

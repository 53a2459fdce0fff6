"""Optimizers of all kinds train on stages and replicas as on one device, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.ir.errors import OptionError
from support import jobs, models, optimizers, plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn

# -- schedule-free --------------------------------------------------------------------------------


def evaluated(n_stages: int, dp: int, folder: str = "", **options: Any) -> list[torch.Tensor]:
    """Losses in training, and in evaluation with the averaged parameters, which come and go with
    the optimizer's mode; then the parameters that a checkpoint is taken of and opened with."""
    pipe = jobs.pipeline("llama", n_stages, dp, 2, optimizer=optimizers.ScheduleFree, **options)
    batches = models.batches("llama", 4 * dp, 6)
    shares = [plain.cut(batch, pipe.data_shards)[pipe.data_shard] for batch in batches]
    pipe.compile_for(shares[0])
    seen = []
    for first in (0, 2):
        pipe.optimizer.train()
        seen += [pipe.step(share).clone() for share in shares[first : first + 2]]
        pipe.optimizer.eval()
        seen.append(pipe.evaluate(shares[4]).clone())
    if folder:
        pipe.save(folder)
        pipe = jobs.pipeline("llama", n_stages, dp, 2, optimizer=optimizers.ScheduleFree, **options)
        pipe.compile_for(shares[0])
        pipe.load(folder)
    averaged = pipe.state_dict()
    pipe.optimizer.train()
    seen.append(pipe.step(shares[5]).clone())
    return [*seen, *averaged.values(), *pipe.state_dict().values()]


def evaluated_plainly(dp: int) -> list[torch.Tensor]:
    model = models.build("llama")
    optimizer = optimizers.ScheduleFree(model.parameters())
    batches = models.batches("llama", 4 * dp, 6)

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = plain.accumulate(model, batch, dp, 2)
        optimizer.step()
        return loss

    seen = []
    for first in (0, 2):
        optimizer.train()
        seen += [step(batch) for batch in batches[first : first + 2]]
        optimizer.eval()
        model.eval()
        with torch.no_grad():
            pieces = [model(**piece).loss for piece in plain.cut(batches[4], 2 * dp)]
        seen.append(torch.stack(pieces).view(dp, 2).mean(1).mean())
        model.train()
    averaged = [tensor.clone() for tensor in model.state_dict().values()]
    optimizer.train()
    seen.append(step(batches[5]))
    return [*seen, *averaged, *model.state_dict().values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_stages", "dp", "zero"),
    quickly([(1, 2, 1)], [(2, 1, 0), (1, 2, 0), (2, 2, 0), (1, 2, 1), (2, 2, 1), (1, 3, 1)]),
)
def test_schedule_free_has_its_two_modes(
    gang: Callable[[int], Gang], tmp_path: Path, n_stages: int, dp: int, zero: int
) -> None:
    expected = evaluated_plainly(dp)
    options: dict[str, Any] = {"zero": zero, "folder": str(tmp_path)}
    found = [evaluated(n_stages, dp, zero=zero)]
    found += gang(n_stages * dp).run(evaluated, n_stages, dp, **options)
    assert all(all(map(torch.equal, each, expected)) for each in found)


@pytest.mark.parametrize(
    ("zero", "by"),
    quickly([], [(z, b) for z in (1, 2, 3) for b in ("rows", "matrices")]),
)
def test_schedule_free_divided_and_in_bf16(
    gang: Callable[[int], Gang], tmp_path: Path, zero: int, by: str
) -> None:
    """Copies and gathered parameters follow the optimizer's mode, too."""
    options = {"zero": zero, "zero_by": by, "precision": "bf16", "folder": str(tmp_path)}
    alone = evaluated(1, 2, **options)
    for found in gang(2).run(evaluated, 1, 2, **options):
        assert all(map(torch.equal, found, alone))


def test_schedule_free_says_that_it_is_not_in_training() -> None:
    pipe = jobs.pipeline("llama", 1, 2, 2, optimizer=optimizers.ScheduleFree, zero=1)
    with pytest.raises(RuntimeError, match=r"call train\(\) before step"):
        pipe.step(models.batches("llama", 8, 1)[0])


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


@pytest.mark.slow
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

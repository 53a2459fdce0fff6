"""A trial finds what is wrong, and says right of what is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pipecompile.compiler.zoo import trial
from pipecompile.compiler.zoo.families import TORCH, Architecture
from pipecompile.compiler.zoo.plain_models import MODELS
from pipecompile.compiler.zoo.subjects import Subject
from support.models import Residual
from torch import nn

SMALL = Architecture(TORCH, "residual")


def residual(architecture: Architecture) -> Subject:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Residual(4)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.body(x)}

    return Subject(WithLoss(), lambda: {"x": torch.randn(4, 8)})


def plainly(model: nn.Module, batches: list[Any], stages: int) -> trial.Values:
    return trial.train_plainly(model, batches)


def test_right_is_right() -> None:
    outcome = trial.try_out(SMALL, 2, residual)
    assert (outcome.outcome, outcome.reason) == ("right", "")
    assert outcome.parameters == 4 * 72


@pytest.mark.parametrize(
    "name", ["loss 1", "norm 0", "grad 1 body.layers.2.bias", "state body.layers.0.weight"]
)
@pytest.mark.parametrize(("by", "expected"), [(4e-6, "close"), (1e-3, "different")])
def test_a_planted_difference_is_found(name: str, by: float, expected: str) -> None:
    def wrong(model: nn.Module, batches: list[Any], stages: int) -> trial.Values:
        values = plainly(model, batches, stages)
        return values | {name: values[name] + by}

    outcome = trial.try_out(SMALL, 2, residual, wrong)
    assert outcome.outcome == expected
    assert outcome.reason == f"1 of 29 differ: {name}"
    assert outcome.difference == pytest.approx(by, rel=0.1)


def test_a_value_that_is_missing_is_different() -> None:
    def forgetful(model: nn.Module, batches: list[Any], stages: int) -> trial.Values:
        values = plainly(model, batches, stages)
        return {k: v for k, v in values.items() if k != "grad 0 body.layers.0.weight"}

    assert trial.try_out(SMALL, 2, residual, forgetful).outcome == "different"


def test_a_model_that_draws_has_nothing_to_compare_with() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.layer(x) * torch.rand(1)).mean()}

    outcome = trial.try_out(SMALL, 1, lambda _: replace(residual(SMALL), model=Drawing()))
    assert (outcome.outcome, outcome.reason[:20]) == ("no eager", "two plain runs diffe")


def test_refusals_and_other_errors_are_told_apart() -> None:
    def refusing(model: nn.Module, batches: list[Any], stages: int) -> trial.Values:
        trial.compile(model, 0)
        return {}

    def failing(model: nn.Module, batches: list[Any], stages: int) -> trial.Values:
        raise RuntimeError("broken\nat length")

    refused, failed = (trial.try_out(SMALL, 2, residual, t) for t in (refusing, failing))
    assert refused.outcome == "refused"
    assert "n_stages=0" in refused.reason
    assert failed.outcome == "failed"
    assert failed.reason.startswith("RuntimeError: broken (zoo/test_trial.py:")


@pytest.mark.parametrize("name", MODELS)
def test_models_of_torch_alone_train_plainly(name: str) -> None:
    torch.manual_seed(0)
    make, batch = MODELS[name]
    model = make()
    values = trial.train_plainly(model, [batch(4), batch(4)])
    assert values["norm 0"] > trial.MAX_NORM
    assert {n for n, p in model.named_parameters() if f"grad 0 {n}" not in values} == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "torch/resnet",
        "causal-lm/llama",
        "image-classification/vit",
        "sequence-classification/jamba",  # a scan by vmap, and a forward that changes its config
    ],
)
def test_real_models_are_right(name: str) -> None:
    assert trial.try_out(Architecture(*name.split("/")), 4).outcome == "right"

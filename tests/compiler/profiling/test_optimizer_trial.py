"""What a step depends on is found out by trying, for kinds of optimizers that people use."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch
from pipecompile.compiler.ir.errors import OptionError
from pipecompile.compiler.profiling.optimizer_trial import Reach, Verdict, try_optimizer
from pipecompile.compiler.tensors.fakes import weightless
from support import models, optimizers
from torch import nn, optim

CPU = torch.device("cpu")


def verdict(factory: Any, model: nn.Module | None = None, rows: bool = True) -> Verdict:
    made = model or models.build("gpt2")
    return try_optimizer(factory, dict(made.named_parameters()), CPU, rows)


def by_kind(named: Any) -> optim.Optimizer:
    """Whole matrices of the layers, and single elements of the rest: by name and shape."""
    named = list(named)
    hidden = [(n, p) for n, p in named if p.dim() == 2 and ".h." in n]
    rest = [(n, p) for n, p in named if p.dim() != 2 or ".h." not in n]
    return Mixed([{"params": hidden, "whole": True}, {"params": rest, "whole": False}])


class Mixed(optimizers.Stepper):
    """Divides by the norm in some groups."""

    def update(self, group: dict[str, Any], param: torch.Tensor, state: dict[str, Any]) -> None:
        norm = param.grad.norm() if group["whole"] else 1.0
        param.sub_(param.grad / norm, alpha=group["lr"])


FOUND: list[tuple[Any, Reach]] = [
    (optim.SGD, Reach.ELEMENT),
    (partial(optim.SGD, lr=1e-9, momentum=0.9), Reach.ELEMENT),
    (optim.AdamW, Reach.ELEMENT),
    (partial(optim.AdamW, fused=True), Reach.ELEMENT),
    (partial(optim.AdamW, foreach=True, amsgrad=True), Reach.ELEMENT),
    (optim.NAdam, Reach.ELEMENT),
    (optim.RAdam, Reach.ELEMENT),
    (optim.Rprop, Reach.ELEMENT),
    (optim.Adagrad, Reach.ELEMENT),
    (optim.ASGD, Reach.ELEMENT),
    (optimizers.ScheduleFree, Reach.ELEMENT),
    (optim.Adafactor, Reach.TENSOR),
    (optimizers.Factored, Reach.TENSOR),
    (partial(optimizers.Factored, least=32), Reach.TENSOR),
    (partial(optimizers.Factored, least=100), Reach.ELEMENT),
    (optimizers.Muon, Reach.TENSOR),
    (optimizers.Shampoo, Reach.TENSOR),
    (partial(optimizers.Shampoo, every=50), Reach.TENSOR),
    (by_kind, Reach.TENSOR),
    (optimizers.Prodigy, Reach.MODEL),
    (optimizers.Clipping, Reach.MODEL),
    (optimizers.InTurn, Reach.MODEL),
    (optim.LBFGS, Reach.MODEL),
]


@pytest.mark.parametrize(("factory", "reach"), FOUND)
def test_how_far_a_step_looks(factory: Any, reach: Reach) -> None:
    found = verdict(factory)
    assert found.reach is reach, found
    assert verdict(factory, rows=False).reach is max(reach, Reach.TENSOR)
    assert bool(found.why) is (reach is not Reach.ELEMENT)


@pytest.mark.parametrize(
    ("factory", "size", "reach"),
    [
        (partial(optimizers.Factored, least=128), 128, Reach.TENSOR),
        (partial(optimizers.Factored, least=500), 600, Reach.TENSOR),
        (optimizers.Wide, 190, Reach.ELEMENT),
        (optimizers.Wide, 600, Reach.TENSOR),
        (optim.AdamW, 600, Reach.ELEMENT),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_large_parameters_are_not_taken_for_small_ones(
    factory: Any, size: int, reach: Reach
) -> None:
    with weightless():
        model = nn.Sequential(nn.Linear(size, size), nn.Linear(size, 2 * size))
    assert verdict(factory, model).reach is reach


def test_it_is_quick_repeats_itself_and_leaves_random_numbers_alone() -> None:
    with weightless():
        model = models.gpt2(n_embd=768, n_head=12, n_layer=12, vocab_size=50257)
    before = torch.get_rng_state()
    first = verdict(optim.AdamW, model)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert verdict(optim.AdamW, model) == first
        seconds.append(time.perf_counter() - start)
    assert torch.equal(before, torch.get_rng_state())
    assert min(seconds) < 0.5


class Failing(optimizers.Stepper):
    def update(self, group: dict[str, Any], param: torch.Tensor, state: dict[str, Any]) -> None:
        raise RuntimeError("no such kernel")


def test_one_that_fails_is_named() -> None:
    with pytest.raises(OptionError, match=r"Failing failed when it was tried .*no such kernel"):
        verdict(Failing)

"""Gradients that are products are added while they are made, where that holds no more memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.ir import ops
from pipecompile.runtime.state.bucket import GradSlot
from support import jobs, models, plain
from support.fused import interpreted, programs
from torch import nn


class Layers(nn.Module):
    """Linear layers, which keep their weights across, and one that does not (GPT-2's Conv1D)."""

    def __init__(self, width: int, frozen: bool = False):
        super().__init__()
        self.first = nn.Linear(width, 2 * width).requires_grad_(not frozen)
        self.across = nn.Parameter(torch.randn(2 * width, width) / width)
        self.last = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.addmm(x, self.first(x).tanh(), self.across).sin()
        return self.last(hidden).pow(2).mean()


def compiled(model: nn.Module, rows: int, width: int, **options: Any) -> Any:
    with interpreted():
        return pipecompile.compile(
            model,
            1,
            microbatches=2,
            example_batch=torch.randn(rows, width),
            backend="inductor",
            **options,
        )


def adding(pipe: Any) -> Counter[str]:
    """What the programs call, by the parameter that it is for."""
    return Counter(
        node.target.__name__
        for program in programs(pipe).values()
        for node in program.module.graph.nodes
        if node.target in (ops.accumulate, ops.accumulate_product)
    )


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_weights_are_added_while_they_are_made_and_biases_are_not(schedule: str) -> None:
    model = Layers(8)
    pipe = compiled(model, 8, 8, schedule=schedule)
    assert adding(pipe) == {"accumulate_product": 3, "accumulate": 1}
    x = torch.randn(8, 8)
    losses = [model(piece) for piece in x.chunk(2)]
    (sum(losses) / 2).backward()  # type: ignore[union-attr]
    with_products = pipe.forward_backward(x)
    torch.testing.assert_close(with_products, torch.stack(losses).mean())
    for name, param in pipe.named_parameters():
        torch.testing.assert_close(param.grad, model.get_parameter(name).grad)


def test_what_would_have_to_be_held_longer_stays_apart() -> None:
    """Of many rows, a layer's gradients of its results are larger than those of its weights."""
    few, many = compiled(Layers(8), 8, 8), compiled(Layers(8), 512, 8)
    assert adding(few)["accumulate_product"] == 3
    assert adding(many)["accumulate_product"] < 3


def test_frozen_weights_have_no_sums() -> None:
    assert adding(compiled(Layers(8, frozen=True), 8, 8)) == {"accumulate_product": 2}


def test_a_tied_weight_is_added_up_first() -> None:
    """Its gradient is a sum, and no product."""
    with interpreted():
        pipe = jobs.pipeline("gpt2", 1, 1, 2, backend="inductor")
        pipe.compile_for(models.batches("gpt2", 4, 1)[0])
    for program in programs(pipe).values():
        for node in program.module.graph.find_nodes(
            op="call_function", target=ops.accumulate_product
        ):
            assert "wte" not in node.args[0].name


@pytest.mark.parametrize("turned", [False, True])
def test_a_slot_adds_products_as_it_adds_gradients(turned: bool) -> None:
    """The first is written, others are added, in another dtype too, and whatever the layout."""
    left, right = torch.randn(6, 4), torch.randn(4, 5)
    total = torch.full((5, 6), float("nan")).t() if turned else torch.full((6, 5), float("nan"))
    slot = GradSlot(total)
    slot.add_product(left, right)
    torch.testing.assert_close(total, left @ right)
    slot.add_product(left, right)
    slot.add_product(left.bfloat16(), right.bfloat16())
    expected = 2 * (left @ right) + (left.bfloat16() @ right.bfloat16()).float()
    torch.testing.assert_close(total, expected)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_replicas_train_as_they_do_apart(zero: int, schedule: str) -> None:
    """With slots that add in one pass, and those that send gradients away."""
    options: dict[str, Any] = {"zero": zero, "schedule": schedule}
    batches = models.batches("llama", 8, 2)
    fused = plain.train_pipeline(
        jobs.pipeline("llama", 2, 2, 2, backend="inductor", **options), batches
    )
    eager = plain.train_pipeline(jobs.pipeline("llama", 2, 2, 2, **options), batches)
    torch.testing.assert_close(fused.losses, eager.losses, rtol=1e-5, atol=1e-6)
    for name, tensor in eager.params.items():
        torch.testing.assert_close(fused.params[name], tensor, rtol=1e-4, atol=1e-5)

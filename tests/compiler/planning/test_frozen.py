"""What is frozen is priced so: stages of a teacher have a forward, and nothing else."""

from __future__ import annotations

from functools import partial
from typing import Any

import pipecompile
import pytest
import torch
from support import models
from torch import nn
from torch.nn.functional import kl_div


class Pair(nn.Module):
    """A student that learns from a teacher's probabilities, and both are asked for the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.teacher = models.Residual(6, width=64).requires_grad_(False)
        self.student = models.Residual(2, width=64)

    def aims(self, model: models.Residual, x: torch.Tensor) -> torch.Tensor:
        for layer in model.layers:
            x = x + layer(x).tanh()
        return x.log_softmax(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        aims, found = self.aims(self.teacher, x), self.aims(self.student, x)
        return kl_div(found, aims, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("costs", ["roofline", "profile"])
def test_stages_of_a_teacher_have_no_backward_gradients_or_optimizer(costs: Any) -> None:
    pipe = pipecompile.compile(
        Pair(),
        2,
        microbatches=2,
        pin={"teacher": 0, "student": 1},
        costs=costs,
        optimizer=partial(torch.optim.Adam, lr=0.1),
        example_batch=torch.randn(8, 64),
    )
    teacher, student = pipe.plan.stages
    assert all(name.startswith("teacher.") for name in teacher.params)
    assert len(teacher.params) == 12
    assert teacher.forward_s > 0
    assert teacher.backward_s == teacher.recompute_s == 0
    assert teacher.backward_flops == teacher.stash_bytes == 0
    assert teacher.memory.grads == teacher.memory.states == 0
    assert teacher.memory.weights == 4 * 6 * (64 * 64 + 64)
    trained = 4 * 2 * (64 * 64 + 64)
    assert student.backward_s > 0
    assert student.memory.grads == trained
    assert student.memory.states >= 2 * trained

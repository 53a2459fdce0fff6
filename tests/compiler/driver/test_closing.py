"""What a step takes once, after its microbatches."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from pipecompile.compiler.costs.hardware import CPU
from pipecompile.compiler.driver.closing import AGREEMENTS
from support import jobs, models

AGREE_S = 1.0


@cache
def _closing_s(agree_s: float, clips: bool) -> tuple[float, float]:
    """Of each rank, by its plan."""
    batch = models.batches("llama", 4, 1)[0]
    options: dict[str, Any] = {"max_grad_norm": 1.0} if clips else {}
    pipe = jobs.pipeline(
        "llama", 2, 1, 2, hardware=replace(CPU, agree_s=agree_s), example_batch=batch, **options
    )
    first, last = (stage.closing_s for stage in pipe.plan.stages)
    return first, last


@pytest.mark.parametrize("clips", [False, True])
def test_ranks_agree_on_each_batch_its_loss_and_its_norm(clips: bool) -> None:
    torch.set_num_threads(1)
    times = AGREEMENTS + clips
    for with_it, without in zip(_closing_s(AGREE_S, clips), _closing_s(0.0, clips), strict=True):
        assert with_it - without == pytest.approx(times * AGREE_S)

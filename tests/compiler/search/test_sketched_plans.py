"""What can be planned can be sketched, however little memory there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from pipecompile.compiler.costs.hardware import H100
from pipecompile.compiler.driver.auto import Way
from pipecompile.compiler.ir.errors import MemoryBudgetError, PipecompileError
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.plan.plan import Plan
from pipecompile.compiler.search.divisions import DOUBTFUL
from pipecompile.compiler.search.subject import Subject
from pipecompile.passes.schedule.registry import SCHEDULES
from support.searched import of_gpt2

SLOW = pytest.mark.slow

OPTIONS = CompileOptions(n_stages=1, zero="auto", optimizer=torch.optim.AdamW, time_limit_s=3.0)
NEAR_S = 0.2
"""Of a plan's step: a small model's stages are uneven, so that orders and programs count for more
than where `search.TIE` is said of."""
NEAR_BYTES = 0.3  # of its peak


def _peak(plan: Plan) -> int:
    return max(stage.memory.peak for stage in plan.stages)


def _tighter(way: Way, parts: Sequence[float]) -> Iterator[tuple[Subject, Plan]]:
    """With less and less memory, while there are plans.

    Args:
        parts: of what it takes where memory is free.
    """
    whole = _peak(of_gpt2(OPTIONS, 4, 16, H100).model.plan(way))
    for part in parts:
        asked = of_gpt2(replace(OPTIONS, memory=f"{int(part * whole)}B"), 4, 16, H100)
        try:
            plan = asked.model.plan(way)
        except PipecompileError:
            return
        yield asked, plan


def _check(way: Way, parts: Sequence[float], least: int) -> None:
    """Sketches are made of what can be planned, and are near; at least so many of them."""
    found = 0
    for asked, plan in _tighter(way, parts):
        sketch = asked.sketch(way)
        assert sketch.step_s == pytest.approx(plan.step_s, rel=NEAR_S), (found, way)
        budget = asked.target.budget_bytes
        assert sketch.peak_bytes <= budget * DOUBTFUL
        assert sketch.peak_bytes >= _peak(plan) * (1 - NEAR_BYTES), (found, way)
        found += 1
    assert found >= least, way


@pytest.mark.parametrize(
    ("schedule", "virtual", "least"),
    [
        ("1f1b", None, 2),
        pytest.param("interleaved", 2, 2, marks=SLOW),
        *(
            pytest.param(kind.name, 2 if kind.virtual == (2,) else None, 1, marks=SLOW)
            for kind in SCHEDULES.values()
            if kind.name not in ("1f1b", "interleaved")
        ),
    ],
)
def test_a_sketch_is_made_of_what_just_fits(schedule: str, virtual: int | None, least: int) -> None:
    """Ranks that hold several stages share their memory otherwise than half and half."""
    _check(Way(2, 1, schedule, virtual, zero=0, microbatches=2), (0.9, 0.8), least)


def test_sketches_know_what_weight_gradients_wait_with() -> None:
    """All that is computed again is held until they have run, on the last ranks of every
    microbatch in flight."""
    options = replace(OPTIONS, remat="full")
    peaks, drafts = {}, {}
    for schedule in ("1f1b", "zb_h1"):
        asked = of_gpt2(options, 4, 32, H100)
        way = Way(4, 1, schedule, zero=0, microbatches=8)
        peaks[schedule] = asked.sketch(way).peak_bytes
        drafts[schedule] = _peak(asked.model.plan(way))
        assert peaks[schedule] == pytest.approx(drafts[schedule], rel=NEAR_BYTES)
    assert drafts["zb_h1"] > 1.4 * drafts["1f1b"]
    tight = replace(options, memory=f"{drafts['1f1b']}B")
    assert of_gpt2(tight, 4, 32, H100).model.plan(Way(4, 1, "1f1b", zero=0, microbatches=8))
    with pytest.raises(MemoryBudgetError):
        of_gpt2(tight, 4, 32, H100).sketch(Way(4, 1, "zb_h1", zero=0, microbatches=8))

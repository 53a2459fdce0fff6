"""What is refused before it is divided has no plan."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pipecompile.compiler.costs.hardware import CPU, H100
from pipecompile.compiler.driver.auto import Open, Way
from pipecompile.compiler.ir.errors import MemoryBudgetError, PipecompileError
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.search.room import Least, check_room
from pipecompile.compiler.search.sketch import load_for
from pipecompile.compiler.search.space import ways_of
from pipecompile.compiler.search.subject import Subject
from support.matrix import quickly
from support.searched import of_gpt2, of_net

OPTIONS = CompileOptions(n_stages=1, zero="auto", optimizer=torch.optim.AdamW)
OPEN = Open(divides=True, orders=True)


def least_of(asked: Subject, way: Way) -> tuple[Any, Least, Any]:
    outline = asked._outline(way)
    options = outline.settings.options
    load = None
    if not options.kind.searches and options.virtual == 1:
        load = load_for(options.kind, options.shape(outline.settings.microbatches))
    return outline, Least.of(outline), load


def within(asked: Subject, way: Way, budget: float) -> bool:
    """Whether ranks with so much are not refused."""
    outline, least, load = least_of(asked, way)
    settings = replace(outline.settings, budget_bytes=budget)
    try:
        check_room(replace(outline, settings=settings), least, load)
    except MemoryBudgetError:
        return False
    return True


def checked(asked: Subject, ways: Sequence[Way]) -> list[float]:
    """The smallest budget that is not refused, as a part of the peak of each way's plan."""
    found = []
    for way in ways:
        try:
            plan = asked.model.plan(way)
        except PipecompileError:
            continue
        peak = max(stage.memory.peak + stage.memory.device for stage in plan.stages)
        assert within(asked, way, peak), way
        low, high = 0, peak
        while high - low > 0.01 * peak:
            middle = (low + high) // 2
            low, high = (low, middle) if within(asked, way, middle) else (middle, high)
        found.append(high / peak)
    return found


@pytest.mark.parametrize(
    ("remat", "precision"),
    quickly(
        [("full", "fp32"), ("none", "bf16_params")],
        itertools.product(["full", "none"], ["fp32", "bf16_params"]),
    ),
)
def test_no_plan_takes_less(remat: str, precision: str) -> None:
    options = replace(OPTIONS, remat=remat, precision=precision)
    ways = ways_of(OPEN, options, 4, 8)[:: 17 if remat == "full" else 23]
    parts = checked(of_net(options, 4, 8, CPU), ways)
    assert len(parts) > 5
    assert max(parts) > 0.8
    assert statistics.median(parts) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none"])
@pytest.mark.parametrize(("make", "step"), [(of_net, 2), (of_gpt2, 11)])
def test_no_plan_of_a_larger_space_takes_less(make: Any, step: int, remat: str) -> None:
    options = replace(OPTIONS, remat=remat)
    parts = checked(make(options, 4, 8, CPU), ways_of(OPEN, options, 4, 8)[::step])
    assert max(parts) > 0.8


def test_what_devices_take_for_themselves_counts() -> None:
    asked = of_net(OPTIONS, 4, 8, H100, whole=True)
    ways = [Way(2, 2, "1f1b", zero=level, microbatches=2) for level in (0, 3)]
    parts = checked(asked, ways)
    assert min(parts) > 0.5
    plain = of_net(OPTIONS, 4, 8, H100)
    assert within(plain, ways[0], 1e9)
    assert not within(asked, ways[0], 1e9)

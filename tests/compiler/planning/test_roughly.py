"""A step that is known roughly: the plan that is searched for is no longer."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.costs.hardware import H100
from pipecompile.compiler.driver.builder import Builder
from pipecompile.compiler.driver.compiled import Compiled, Mode
from pipecompile.compiler.ir.errors import MemoryBudgetError
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.planning import planner
from pipecompile.compiler.planning.ordering import Ordering
from pipecompile.compiler.planning.planner import Drafted, Planner
from pipecompile.compiler.planning.target import Target
from support.matrix import quickly
from torch import nn

HOST = torch.device("cpu")


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide = [(256, 512), (512, 256), (256, 2048), (2048, 256)]
        linears = [nn.Linear(*each) for each in 2 * wide]
        self.layers = nn.Sequential(*(m for each in linears for m in (each, nn.Tanh())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def built(schedule: str, roughly: bool, budget_bytes: float) -> Compiled:
    _, spec = flatten({"x": torch.zeros(2048, 256)})
    options = CompileOptions(n_stages=2, schedule=schedule)
    target = Target(HOST, H100, budget_bytes, roughly=roughly)
    builder = Builder(skeleton_of(Uneven(), HOST), options, target)
    return builder.build(Mode.TRAIN, spec, 6)


CASES = [(schedule, limit) for schedule in ("1f1b", "zb_v") for limit in (math.inf, float(1 << 30))]


@pytest.mark.parametrize(("schedule", "budget_bytes"), quickly(CASES[:3], CASES))
def test_what_is_searched_for_is_no_longer(schedule: str, budget_bytes: float) -> None:
    whole = built(schedule, False, budget_bytes).plan
    searched = mock.patch.object(Ordering, "search", side_effect=AssertionError)
    refined = mock.patch.object(Planner, "_refined", side_effect=AssertionError)
    with searched, refined:
        rough = built(schedule, True, budget_bytes).plan
    assert whole.step_s <= rough.step_s <= 1.2 * whole.step_s


@pytest.mark.parametrize("limit", [planner.HOPELESS, math.inf])
def test_what_needs_far_more_than_there_is_is_drafted_once(limit: float) -> None:
    peaks: list[int] = []
    drafted = Planner._drafted

    def counted(own: Planner, *given: Any) -> Drafted:
        found = drafted(own, *given)
        peaks.append(max(found.peak_bytes))
        return found

    budget = float(8 << 20)
    with (
        mock.patch.object(Planner, "_drafted", counted),
        mock.patch.object(planner, "HOPELESS", limit),
        pytest.raises(MemoryBudgetError, match="planned roughly"),
    ):
        built("1f1b", True, budget)
    assert min(peaks) > planner.HOPELESS * budget
    assert len(peaks) == 1 if limit < math.inf else len(peaks) > 1

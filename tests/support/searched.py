"""Models and devices as a search asks for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from pipecompile.compiler.capture.batch import BatchSpec, flatten
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.costs.hardware import Device
from pipecompile.compiler.driver.auto import Way
from pipecompile.compiler.driver.builder import Builder
from pipecompile.compiler.driver.capturing import Shared
from pipecompile.compiler.ir.errors import MemoryBudgetError, PipecompileError
from pipecompile.compiler.options.microbatches import divide
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.planning.target import Target
from pipecompile.compiler.search.search import TIE, Found, search
from pipecompile.compiler.search.subject import Subject
from torch import nn

from support import models

HOST = torch.device("cpu")


def made_plan(step_s: float, peak: float = 1) -> Any:
    """All that a search asks of a plan.

    Raises:
        MemoryBudgetError: it takes infinitely long, which stands for one that does not fit.
    """
    if math.isinf(step_s):
        raise MemoryBudgetError("too much", (), None, proven=True)
    seconds = {"forward_s": step_s / 4, "backward_s": 0.0, "recompute_s": 0.0, "closing_s": 0.0}
    stages = [SimpleNamespace(memory=SimpleNamespace(peak=peak), **seconds)]
    told = {"options": {"zero": "0"}, "bubble": 0.0, "microbatches": 4}
    return SimpleNamespace(stages=stages, ranks=[stages], step_s=step_s, **told)


class Net(nn.Module):
    """Small, quickly traced, and uneven."""

    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 32, 32, 96, 32)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x.square().mean()


def subject_of(
    options: CompileOptions,
    devices: int,
    rows: int,
    device: Device,
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    whole: bool = False,
) -> Subject:
    _, spec = flatten(batch)
    skeleton = skeleton_of(model, HOST, options.dtypes, training=options.training)
    shared = Shared()
    budget = device.memory_bytes if whole else options.memory_bytes or math.inf
    target = Target(HOST, device, budget, whole=whole)

    def divided(tried: CompileOptions) -> tuple[BatchSpec, int, tuple[()]]:
        return *divide(spec, tried, tried.dp), ()

    def builder(tried: CompileOptions) -> Builder:
        return Builder(skeleton, tried, target, captured=shared)

    return Subject(options, target, devices, builder, divided)


def of_net(
    options: CompileOptions, devices: int, rows: int, device: Device, whole: bool = False
) -> Subject:
    batch = {"x": torch.zeros(rows, 32)}
    return subject_of(options, devices, rows, device, Net(), batch, whole)


def of_gpt2(
    options: CompileOptions, devices: int, rows: int, device: Device, whole: bool = False
) -> Subject:
    ids = torch.zeros(rows, 16, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    return subject_of(options, devices, rows, device, models.build("gpt2"), batch, whole)


def brute_forced(
    asked: Subject, ways: Sequence[Way], every: Iterable[Way]
) -> tuple[Found, dict[Way, float]]:
    """The search's step is at most `TIE` above the best of all plans; no bound is above a plan.

    Args:
        every: those that are planned, one after the other.

    Returns:
        What is found of ``ways``, and the steps of all that have a plan.
    """
    found = search(ways, asked.model)
    steps_s: dict[Way, float] = {}
    for way in every:
        try:
            steps_s[way] = asked.model.plan(way).step_s
        except PipecompileError:
            continue
        assert asked.bound(way) <= steps_s[way] * (1 + 1e-9), way
    assert found.best.step_s is not None
    assert found.best.step_s <= min(steps_s.values()) * (1 + TIE)
    return found, steps_s

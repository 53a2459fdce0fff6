"""Where a backend compiles programs, it is what it compiles that is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipecompile.compiler.ir.actions import Kind
from pipecompile.compiler.ir.program import StageProgram
from pipecompile.compiler.profiling import profile
from pipecompile.compiler.profiling.profile import Backend, Profiler
from pipecompile.compiler.profiling.timing_cache import TimingCache
from support import jobs, models, plain, units
from torch import nn

CPU = torch.device("cpu")
SLOW_S = 0.05


class Slow(nn.Module):
    """A program that takes longer."""

    def __init__(self, whole: Any):
        super().__init__()
        self.whole, self.graph = whole, whole.graph

    def forward(self, boxed: list[Any]) -> Sequence[torch.Tensor]:
        time.sleep(SLOW_S)
        made: Sequence[torch.Tensor] = self.whole.forward(boxed)
        return made


def slower(stage: StageProgram, _: torch.device) -> StageProgram:
    """A backend that makes forwards slow."""
    stage.forward.prepare()
    module: Any = Slow(stage.forward.module)
    return replace(stage, forward=replace(stage.forward, module=module))


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "MIN_ROUNDS", 1)
    monkeypatch.setattr(profile, "MAX_ROUNDS", 1)


@pytest.fixture(scope="module")
def gpt2() -> list[StageProgram]:
    torch.manual_seed(0)
    return units.programs(units.captured(models.gpt2(n_layer=1), models.tokens(2)))


def test_what_the_backend_makes_is_timed(gpt2: list[StageProgram], tmp_path: Path) -> None:
    profiler = Profiler(CPU, tmp_path, 20, backend=Backend("slow", slower))
    compiled, eager = profiler.times(gpt2), profiler.eager.times(gpt2)
    assert all(t.forward_s >= SLOW_S > t.backward_s for t in compiled)
    assert all(t.forward_s < SLOW_S for t in eager)
    assert profiler.told != profiler.eager.told
    assert len(list(tmp_path.iterdir())) == 2  # and neither takes the other's for its own
    again = Profiler(CPU, tmp_path, 0, backend=Backend("slow", slower))
    assert again.times(gpt2) == compiled
    assert again.eager.times(gpt2) == eager


def test_eager_kernels_are_their_own_backend(tmp_path: Path) -> None:
    profiler = Profiler(CPU, tmp_path)
    assert profiler.eager is profiler
    assert TimingCache(CPU, tmp_path).path == TimingCache(CPU, tmp_path, backend="eager").path


def priced(monkeypatch: pytest.MonkeyPatch, folder: Path, **options: Any) -> Any:
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(folder))
    return jobs.pipeline("gpt2", 2, 1, 2, costs="profile", **options)


def test_plans_have_the_seconds_of_what_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also those that recompute, whose seconds are eager kernels' times what compiling changes."""
    from pipecompile.runtime import world

    monkeypatch.setattr(world, "_backend", lambda _: Backend("slow", slower))
    pipe = priced(monkeypatch, tmp_path, remat="full")
    pipe.compile_for(models.batches("gpt2", 4, 1)[0])
    for stage in pipe.plan.stages:
        assert stage.forward_s >= SLOW_S
        assert stage.backward_s < SLOW_S


@pytest.mark.slow
def test_inductors_kernels_are_measured_and_train_as_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipe = priced(monkeypatch, tmp_path, backend="inductor", remat="full", schedule="zb_h1")
    batches = models.batches("gpt2", 4, 2)
    found = plain.train_pipeline(pipe, batches)
    names = [path.name for path in tmp_path.glob("times-*.json")]
    assert len(names) == 2
    assert sum("inductor" in name for name in names) == 1
    expected = plain.train_pipeline(priced(monkeypatch, tmp_path), batches)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=1e-6)
    assert {Kind.F, Kind.B, Kind.W} == set(pipe.programs.stages[1].parts)

"""`pipecompile inspect --costs calibrated`."""

from __future__ import annotations

import pipecompile
import pytest
import torch
from pipecompile.compiler.cli.main import main
from support.commands import SMALL_GPT2, inspect, plan_of
from torch import nn

STEPS = f"{SMALL_GPT2} --stages 1 --microbatches 1 --batch 4"


@pytest.mark.slow
def test_the_table_is_told_and_its_seconds_are_longer(capsys: pytest.CaptureFixture[str]) -> None:
    bound = plan_of(f"{STEPS} --device h100", capsys)
    real = plan_of(f"{STEPS} --device h100 --costs calibrated", capsys)
    assert (bound["costs"], real["costs"]) == ("roofline", "calibrated")
    assert real["step_s"] > bound["step_s"]
    assert dict(real["notes"])["calibration"] == "h100: published figures and runs"


@pytest.mark.slow
def test_a_generic_table_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    said = inspect(f"{STEPS} --device l4 --costs calibrated", capsys)
    assert "generic efficiency: there is no table for l4" in said
    assert "what l4 reaches by shape (calibrated)" in said


def test_fused_operators_move_less(capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{STEPS} --device h100 --costs calibrated --seq 32 --backend"
    eager, fused = (plan_of(f"{command} {name}", capsys) for name in ("eager", "inductor"))
    assert fused["step_s"] < 0.9 * eager["step_s"]


def test_nothing_is_profiled_by_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *SMALL_GPT2.split(), "--stages", "1", "--costs", "profile"]) == 2
    assert "use roofline or calibrated" in capsys.readouterr().err


def test_a_pipeline_is_planned_by_the_table_of_its_device() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    batch = torch.zeros(4, 64)
    pipes = [
        pipecompile.compile(
            model, 1, costs=costs, example_batch=batch, loss_fn=lambda out, _: out.square().mean()
        )
        for costs in ("calibrated", "roofline")
    ]
    plans = [pipe.plan for pipe in pipes]
    assert [plan.costs for plan in plans] == ["calibrated", "roofline"]
    assert dict(plans[0].notes)["calibration"] == "cpu: one generic core"
    assert "calibration" not in dict(plans[1].notes)

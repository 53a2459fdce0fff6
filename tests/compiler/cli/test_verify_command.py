"""`pipecompile verify`: what it prints, and how it ends."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from pipecompile.compiler.capture import exporting
from pipecompile.compiler.cli.main import main

FILE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.count = 0

    def forward(self, x):
        self.count += 1
        for layer in self.layers:
            x = nn.functional.dropout(layer(x).tanh(), 0.2, self.training)
        return x{0}

def build():
    batch = torch.randn(8, 8), torch.randn(8, 8)
    return Model(), batch, lambda output, batch: (output - batch[1]).square().mean()
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return tmp_path / "model.py"


def test_a_file_that_is_right(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec.write_text(FILE.replace("{0}", ""))
    command = ["verify", f"{spec}:build", "--stages", "2", "--microbatches", "2", "--steps", "3"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 4 + 2
    assert all(line.endswith("identical to the last bit") for line in lines[:-1])
    assert "outputs" in lines[-1]  # of the whole batch, whose products may round otherwise


def test_what_differs_is_named(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec.write_text(FILE.replace("{0}", " * self.count"))
    command = ["verify", f"{spec}:build", "--stages", "2", "--microbatches", "2"]
    with mock.patch.object(exporting, "check_next_calls", return_value=None):
        assert main(command) == 1
    assert "step 1, loss: 'loss' differs by" in capsys.readouterr().err


@pytest.mark.slow
def test_stages_may_be_chosen(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec.write_text(FILE.replace("{0}", ""))
    command = ["verify", f"{spec}:build", "--stages", "auto", "--devices", "2"]
    assert main([*command, "--microbatches", "2"]) == 0
    assert capsys.readouterr().out.count("identical to the last bit") >= 8


@pytest.mark.slow
def test_a_plan_has_its_stages(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec.write_text(FILE.replace("{0}", ""))
    plan = str(spec.with_name("plan.json"))
    inspected = ["inspect", f"{spec}:build", "--stages", "2", "--microbatches", "2"]
    assert main([*inspected, "--save", plan]) == 0
    capsys.readouterr()
    assert main(["verify", f"{spec}:build", "--plan", plan]) == 0
    assert capsys.readouterr().out.count("identical to the last bit") >= 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stages 2 --devices 4", "--devices has no effect without --stages auto"),
        ("--stages auto", "--stages auto divides --devices N: say how many there are"),
        ("--stages auto --devices 4 --dp 2", "--dp cannot be given with --stages auto"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "hf:gpt2", *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_number_of_stages_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "hf:gpt2"]) == 2
    assert "--stages N" in capsys.readouterr().err

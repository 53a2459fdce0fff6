"""`pipecompile inspect train.py -- …`: the own model, options and batch of a script."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipecompile.compiler.cli.main import main
from support.commands import inspect, plan_of

SCRIPT = """
import argparse
from functools import partial
from pathlib import Path
import pipecompile, torch
from torch import nn

class Net(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x.square().mean()

def build():
    return Net(2), {"x": torch.randn(16, 16)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--example", action="store_true")
    args = parser.parse_args()
    batch = {"x": torch.randn(16, 16)}
    pipe = pipecompile.compile(
        Net(args.layers), 2, dp=2, optimizer=partial(torch.optim.SGD, lr=0.1), microbatches=4,
        example_batch=batch if args.example else None, max_grad_norm=1.0,
    )
    try:
        pipe.step(batch)
    except Exception:
        pass
    Path("trained").touch()
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize("example", ["", " --example"])
def test_a_script(script: Path, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect(f"{script} -- --layers 6{example}", capsys)
    assert f"Net: {6 * (16 * 16 + 16):,} parameters" in report
    assert "2 stages × dp 2 = 4 ranks; 4 microbatches of 2 rows" in " ".join(report.split())
    assert not Path("trained").exists()


INFERS = """
import pipecompile, torch
pipe = pipecompile.compile(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), 2,
                           training=False, microbatches=2)
pipe.predict(iter([{"input": torch.ones(4, 8)}]))
raise ValueError("it ran")
"""


def test_a_script_that_only_infers(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is stopped before its first forward."""
    script.write_text(INFERS)
    report = inspect(str(script), capsys)
    assert "rows/s of forwards alone" in " ".join(report.split())
    assert "2 microbatches of 2 rows per replica" in " ".join(report.split())


def test_flags_say_whether_it_trains(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What has no use for inference is then not the script's either."""
    plan = plan_of(f"{script} --training false", capsys)
    assert [stage["backward_s"] for stage in plan["stages"]] == [0, 0]
    states = {}
    for name in ("none", "adamw"):
        made = plan_of(f"{script} --optimizer {name}", capsys)
        states[name] = sum(stage["memory"]["states"] for stage in made["stages"])
    assert states["adamw"] > states["none"] == 0


def test_a_script_whose_programs_are_recorded(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is a device that records; its report is no wider."""
    script.write_text(SCRIPT.replace("microbatches=4,", "microbatches=4, cudagraphs=True,"))
    report = inspect(f"{script} --device h100 -- --example", capsys)
    assert "cudagraphs: " in report
    assert max(map(len, report.splitlines())) <= 80
    assert "cudagraphs: " not in inspect(f"{script} -- --example", capsys)


SESSION = """
import pipecompile.elastic, torch
from torch import nn
session = pipecompile.elastic.Session()
model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)), nn.Flatten())
batch = {"input": torch.randn(16, 16)}
pipe = session.compile(model, (2, 4), global_microbatches=8, example_batch=batch,
                       loss_fn=lambda output, batch: output.square().mean())
"""


def test_a_session_keeps_its_limits(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks of a replica, and microbatches of all replicas together."""
    script.write_text(SESSION)
    tried = plan_of(f"{script} --devices 4", capsys)["tried"]
    ways = {(t["n_stages"], t["dp"], t["microbatches"]) for t in tried}
    assert ways <= {(2, 2, 4), (4, 1, 8)}
    plan = plan_of(f"{script} --stages 1 --dp 4", capsys)
    assert plan["microbatches"] == 2
    assert main(["inspect", str(script), "--stages", "2", "--dp", "3"]) == 2
    assert "does not divide global_microbatches=8" in capsys.readouterr().err
    assert main(["inspect", str(script)]) == 2
    assert "say how many there are" in capsys.readouterr().err


def test_flags_change_what_the_script_says(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["inspect", str(script), "--stages", "4", "--dp", "1", "--json"])
    output = capsys.readouterr()
    assert code == 0, output.err
    assert '"n_stages": 4' in output.out
    assert '"microbatches": 4' in output.out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("print('nothing')", "called pipecompile.compile nowhere"),
        ("import pipecompile, torch\npipecompile.compile(torch.nn.Linear(2, 2), 1)", "no batch"),
        ("x = 1\nraise ValueError('of its own')", "train.py:2 with ValueError: of its own"),
        ("import pipecompile, torch\npipecompile.compile(torch.nn.Linear(2, 2), 0)", "n_stages=0"),
    ],
)
def test_scripts_that_say_nothing(
    script: Path, text: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script.write_text(text)
    assert main(["inspect", str(script)]) == 2
    assert told in capsys.readouterr().err


def test_what_follows_the_dashes_is_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "hf:gpt2", "--stages", "2", "--", "--layers", "2"]) == 2
    assert "is for a script" in capsys.readouterr().err
    assert main(["solve", "graphs", "--", "--layers", "2"]) == 2
    assert "scripts that inspect runs" in capsys.readouterr().err


# -- --set of links and devices -------------------------------------------------------------------

GPT2 = "hf:gpt2 --set n_layer=2 --set n_embd=64 --set n_head=2 --set vocab_size=512 --seq 32"


def test_links_and_memory_by_flags(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{script}:build --stages 2 --microbatches 4 --device h100"
    plan = plan_of(command, capsys)
    slow = plan_of(f"{command} --set link.bytes_per_s=1MB/s", capsys)
    assert slow["device"] == "h100 with link.bytes_per_s=1MB/s"
    assert slow["step_s"] > 2 * plan["step_s"]
    small = plan_of(f"{command} --set device.memory_bytes=4GiB", capsys)
    assert small["budget_bytes"] == 4 * 2**30
    late = plan_of(f"{command} --set device.launch_s=1e-3", capsys)
    assert late["step_s"] > 10 * plan["step_s"]
    weak = plan_of(f"{command} --set device.flops_per_s.float32=1e8", capsys)
    assert weak["step_s"] > 1.2 * plan["step_s"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("link.bytes_per_sec=1e9", "did you mean link.bytes_per_s?"),
        ("link.bytes_per_s=0", "must be a number above 0"),
        ("device.launch_s=-1", "must be a number of 0 or more"),
        ("device.bytes_per_s=fast", "give bytes"),
    ],
)
def test_settings_that_cannot_be(
    setting: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*f"inspect {GPT2} --stages 2 --set".split(), setting]) == 2
    assert told in capsys.readouterr().err


def test_the_machine_at_hand_has_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"verify {GPT2} --stages 2 --set link.bytes_per_s=1".split()) == 2
    assert "has no effect on verify" in capsys.readouterr().err

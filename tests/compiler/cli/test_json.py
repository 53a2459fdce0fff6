"""What commands print with --json is one JSON document, whatever they do for it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from pipecompile.compiler.cli.main import main, make_parser
from pipecompile.compiler.plan.plan import TRIED, Plan
from pipecompile.compiler.trace.planned import planned_trace
from pipecompile.compiler.trace.writing import write_trace
from pipecompile.passes.integer.solvers import WarmHighs
from support.commands import SMALL_GPT2
from support.matrix import quickly
from support.timelines import planned

SPEC = """
import torch
from torch import nn

class Branches(nn.Module):
    # no chain of equal layers: the integer program is asked
    def __init__(self):
        super().__init__()
        wide = [64, 512, 64, 256], [384, 64, 128, 512]
        make = lambda w: nn.Sequential(nn.Linear(64, w), nn.Tanh(), nn.Linear(w, 64))
        self.branches = nn.ModuleList(nn.ModuleList(map(make, each)) for each in wide)
    def forward(self, x):
        made = []
        for branch in self.branches:
            y = x
            for layer in branch:
                y = y + layer(y)
            made.append(y)
        return (made[0] * made[1]).square().mean()

def build():
    print("building")
    return Branches(), torch.zeros(64, 64)
"""


def _spec(folder: Path) -> str:
    (folder / "branches.py").write_text(SPEC)
    return f"{folder / 'branches.py'}:build"


def _inspect(folder: Path) -> list[str]:
    return f"inspect {_spec(folder)} --stages 2 --microbatches 4 --solver highs".split()


def _solve(folder: Path) -> list[str]:
    nodes = [{"id": i, "fpgaLatency": 3.0 + i % 3, "size": 4.0} for i in range(8)]
    pairs = [(i, i + 2) for i in range(6)]
    edges = [{"sourceId": u, "destId": v, "cost": 0.5} for u, v in pairs]
    limits = {"fits": 100.0, "fits_nowhere": 1.0}
    graphs = folder / "graphs"
    graphs.mkdir()
    for name, limit in limits.items():
        graph = {"maxFPGAs": 2, "maxSizePerFPGA": limit, "nodes": nodes, "edges": edges}
        (graphs / f"{name}.json").write_text(json.dumps(graph))
    return ["solve", str(graphs), "--solver", "highs"]


def _diff(folder: Path) -> list[str]:
    plan = planned_trace(*planned(2, 2, 3))
    write_trace(plan, folder / "plan.json")
    write_trace(replace(plan, header=replace(plan.header, origin="measured")), folder / "run.json")
    return ["diff", str(folder / "plan.json"), str(folder / "run.json")]


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "inspect": _inspect,
    "solve": _solve,
    "diff": _diff,
}


def test_all_commands_with_json_are_here() -> None:
    (choices,) = (
        action.choices
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    having = {n for n, each in choices.items() if "--json" in each._option_string_actions}
    assert having == set(COMMANDS)


def _strict(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


@pytest.mark.parametrize("command", COMMANDS)
def test_stdout_is_one_document(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the file descriptor: solvers write past Python. Python's `Infinity` is none either."""
    call = WarmHighs.callSolver
    with mock.patch.object(WarmHighs, "callSolver", autospec=True, side_effect=call) as solver:
        assert main([*COMMANDS[command](tmp_path), "--json"]) == 0
    assert solver.called is (command != "diff")
    output = capfd.readouterr()
    assert json.loads(output.out, parse_constant=_strict)
    assert output.err == ("building\n" if command == "inspect" else "")


WAYS = [
    "--stages auto --devices 2 --memory 2.2MiB --batch 2 --set n_layer=1",  # one does not fit
    "--stages auto --devices 4",
    "--stages 2 --schedule auto --microbatches 2",
]


@pytest.mark.parametrize("more", quickly(WAYS[:1], WAYS))
def test_what_was_tried_is_in_the_json(
    more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the plan, which can be read from it."""
    file = tmp_path / "plan.json"
    assert main(f"inspect {SMALL_GPT2} {more} --json --save {file}".split()) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=_strict)
    tried = found.pop(TRIED)
    of = ("n_stages", "dp", "schedule", "virtual_stages", "zero", "microbatches")
    ways = {tuple(each[name] for name in of) for each in tried}
    assert len(ways) == len(tried) >= 2
    possible = [each for each in tried if each["step_s"] is not None]
    failed = [each for each in tried if each["step_s"] is None]
    assert bool(failed) is (more is WAYS[0])
    assert all("needs" in each["reason"] for each in failed)
    taken = min((t for t in possible if not t["about"]), key=lambda each: each["step_s"])
    assert 0 < taken["mfu"] < 1
    assert taken["device_hours"] > 0
    plan = Plan.load(file)
    assert found == json.loads(file.read_text())
    assert (taken["n_stages"], taken["dp"]) == (plan.n_stages, plan.dp)
    assert taken["step_s"] == pytest.approx(plan.step_s)
    assert taken["peak_bytes"] == max(stage.memory.peak for stage in plan.stages)
    assert Plan.from_json(json.dumps(found | {TRIED: tried})) == plan

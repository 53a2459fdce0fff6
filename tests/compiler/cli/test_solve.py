"""`pipecompile solve`: graphs from files, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pipecompile.compiler.cli import main as cli
from support.problems import GIB


def device_graph() -> dict[str, Any]:
    """Two layers and their gradients; a layer and its gradient are of one class."""
    nodes = [
        {"id": 10 * i, "fpgaLatency": t, "size": 4.0, "colorClass": c, "isBackwardNode": b}
        for i, (t, c, b) in enumerate([(3.0, 1, 0), (2.0, 2, 0), (4.0, 2, 1), (5.0, 1, 1)])
    ]
    edges = [
        {"sourceId": 10 * u, "destId": 10 * v, "cost": cost}
        for u, v, cost in [(0, 1, 0.5), (1, 2, 0.0), (2, 3, 0.25)]
    ]
    return {"maxFPGAs": 2, "maxSizePerFPGA": 100.0, "nodes": nodes, "edges": edges}


def layer_plan() -> dict[str, Any]:
    ways = [("vanilla", 1.0, 2.0 * GIB), ("activation recomp", 1.5, 0.5 * GIB)]
    nodes = [
        {
            "id": i,
            "TMPCs": {
                "1": [
                    {"id": name, "timePerSample": s, "memoryUsageA": a, "memoryUsageB": GIB}
                    for name, s, a in ways
                ]
            },
        }
        for i in range(4)
    ]
    edges = [{"sourceId": i, "destId": i + 1, "communicationCost": 2.5 * GIB} for i in range(3)]
    return {"maxDevices": 2, "nodes": nodes, "edges": edges}


def solved(tmp_path: Path, data: object, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    (tmp_path / "graph.json").write_text(json.dumps(data))
    assert cli.main(["solve", str(tmp_path), "--json", *more]) == 0
    [outcome] = json.loads(capsys.readouterr().out)
    return outcome


def test_solve_reads_device_graphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = solved(tmp_path, device_graph(), capsys)
    assert outcome["objective"] == pytest.approx(8.0 + 0.5 + 0.25)
    assert outcome["proven"]
    assert outcome["stage"] == [0, 1, 1, 0]
    assert solved(tmp_path, device_graph(), capsys, "--stages", "1")["objective"] == 14.0


def test_solve_reads_layer_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = 2 * 2.5 / 25
    outcome = solved(tmp_path, layer_plan(), capsys, "--stages", "2", "--memory", "10")
    assert outcome["objective"] == pytest.approx(2.0 + cut)
    outcome = solved(tmp_path, layer_plan(), capsys, "--stages", "2", "--memory", "7")
    assert outcome["objective"] == pytest.approx(2.5 + cut)  # 2 · (2 + 0.5) + 2 GiB on stage 0
    outcome = solved(tmp_path, layer_plan(), capsys, "--stages", "2", "--memory", "2")
    assert outcome["objective"] is None
    assert "too much" in outcome["note"]


def test_solve_prints_a_row_per_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in (("one", device_graph()), ("two", layer_plan())):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    assert cli.main(["solve", str(tmp_path), "--stages", "2", "--time-limit", "5"]) == 0
    head, one, two = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[:4] == ["graph", "nodes", "k", "objective"]
    assert one[:4] == ["one", "4", "2", "8.75"]
    assert two[:4] == ["two", "4", "2", "2.7"] or two[:3] == ["two", "4", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('{"nodes": []}', "is neither a device graph (with maxFPGAs) nor a layer plan"),
        ('{"maxFPGAs": 2, "nodes": [{"id": 1}], "edges": []}', "is missing"),
        ("[]", "is neither"),
    ],
)
def test_solve_refuses_other_files(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "graph.json").write_text(text)
    assert cli.main(["solve", str(tmp_path / "graph.json")]) == 2
    assert message in capsys.readouterr().err

"""`pipecompile inspect` for devices of several kinds: what it shows, writes, reads and searches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pipecompile.compiler.cli.main import main
from pipecompile.compiler.costs.hardware import DEVICES
from support.commands import SMALL_GPT2, inspect, plan_of

MIXED = f"{SMALL_GPT2} --batch 8 --precision bf16 --device a100:1,l4:1"


def test_each_stage_has_its_device(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect(f"{MIXED} --stages 2", capsys)
    assert ["stage", "device", "units"] in [line.split()[:3] for line in report.splitlines()]
    a100, l4 = (DEVICES[name].memory_bytes / 2**20 for name in ("a100", "l4"))
    assert f"of {a100:,.1f}" in report or f"of {a100 / 2**10:.2f}" in report
    assert f"of {l4:,.1f}" in report or f"of {l4 / 2**10:.2f}" in report
    assert "devices: ranks on 1 × " in report
    assert "device memory: taken of that of rank" in report
    assert "peak rates of a100:1,l4:1 (roofline)" in report


def test_the_plan_is_made_again_from_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(f"{MIXED} --stages 2 --save {tmp_path / 'plan.json'}", capsys)
    devices = [stage["device"] for stage in plan["stages"]]
    assert sorted(devices) == ["a100", "l4"]
    assert plan["decision"]["devices"] == devices
    assert [stage["budget_bytes"] for stage in plan["stages"]] == [
        DEVICES[name].memory_bytes for name in devices
    ]
    again = plan_of(f"{SMALL_GPT2} --batch 8 --plan {tmp_path / 'plan.json'}", capsys)
    assert again["decision"] == plan["decision"]
    assert [stage["budget_bytes"] for stage in again["stages"]] == [
        stage["budget_bytes"] for stage in plan["stages"]
    ]
    assert again["step_s"] == pytest.approx(plan["step_s"])


def test_machines_are_described_with_the_devices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machines = {"devices": 1, "bytes_per_s": 1e8, "latency_s": 1e-4}
    rows = [{"device": name, "count": 1} for name in ("a100", "l4")]
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"devices": rows, "topology": machines}))
    command = f"{SMALL_GPT2} --batch 8 --precision bf16 --stages 2"
    far = plan_of(f"{command} --device {path}", capsys)
    flags = "--set machine.devices=1 --set machine.bytes_per_s=1e8 --set machine.latency_s=1e-4"
    same = plan_of(f"{command} --device a100:1,l4:1 {flags}", capsys)
    near = plan_of(f"{command} --device a100:1,l4:1", capsys)
    assert far["step_s"] == same["step_s"] > near["step_s"]


@pytest.mark.slow
def test_a_search_takes_what_replicas_can_share(capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{SMALL_GPT2} --batch 8 --precision bf16 --stages auto --devices 4"
    plan = plan_of(f"{command} --device a100:2,l4:2", capsys)
    tried = {(way["n_stages"], way["dp"]): way["reason"] for way in plan["tried"]}
    assert "dp=4 does not divide 2 × a100" in tried[1, 4]
    assert tried[2, 2] == ""
    assert plan["n_stages"] in (2, 4)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--stages 3", "has 2 devices, and n_stages=3 × dp=1 are 3 ranks"),
        ("--stages 2 --set device.launch_s=1e-5", "which of a100:1,l4:1?"),
    ],
)
def test_contradictions_are_one_line(
    more: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *f"{MIXED} {more}".split()]) != 0
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error

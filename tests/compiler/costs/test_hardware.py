"""Device specifications: where figures come from, and what is said about wrong ones."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pipecompile.compiler.costs.at_hand import device_name, device_spec, gpu_spec
from pipecompile.compiler.costs.cost import node_cost, node_flops, total_cost
from pipecompile.compiler.costs.hardware import (
    A100,
    CPU,
    DEVICES,
    H100,
    H200,
    L4,
    Device,
    parse_device,
)
from pipecompile.compiler.ir.errors import OptionError
from pipecompile.compiler.tensors.facts import short_name
from pipecompile.compiler.tensors.fakes import weightless
from torch import fx


def gpu(name: str, **changes: Any) -> Device:
    """What CUDA would say of a GPU with 80 multiprocessors at 1.5 GHz."""
    given = {"total_memory": 32 << 30, "multi_processor_count": 80, "major": 7}
    rates = {"clock_rate": 1_500_000, "memory_clock_rate": 877_000, "memory_bus_width": 4096}
    return gpu_spec(SimpleNamespace(name=name, **(given | rates | changes)))


def product(dtype: torch.dtype) -> fx.Node:
    """One matrix product of a size at which every device computes longer than it loads."""
    graph = fx.Graph()
    with weightless():
        a = torch.empty(2048, 2048, dtype=dtype)
    left, right = graph.placeholder("a"), graph.placeholder("b")
    left.meta["val"] = right.meta["val"] = a
    node = graph.call_function(torch.ops.aten.mm.default, (left, right))
    node.meta["val"] = a
    return node


def test_names_specs_and_files_are_taken(tmp_path: Path) -> None:
    assert parse_device("H100") is H100
    assert parse_device(A100) is A100
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(dataclasses.asdict(H200)))
    assert parse_device(str(path)) == parse_device(path) == H200


def test_what_sends_take_may_be_left_out_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    known = dataclasses.asdict(H200)
    del known["send_share"]
    path.write_text(json.dumps(known))
    assert parse_device(path) == H200
    path.write_text(json.dumps(known | {"send_share": 0.25}))
    assert parse_device(path).send_share == 0.25
    path.write_text(json.dumps(known | {"send_share": -1}))
    with pytest.raises(OptionError, match="send_share=-1 must be a number of 0 or more"):
        parse_device(path)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"'h10'.*did you mean 'h100'\?.*cpu, h100.*JSON"):
        parse_device("h10")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bytes_per_sec": 1}, r"unknown field 'bytes_per_sec': did you mean 'bytes_per_s'\?"),
        ({"launch_s": None}, "launch_s=None must be a number of 0 or more"),
        ({"memory_bytes": 0}, "memory_bytes=0 must be a number above 0"),
        ({"flops_per_s": {"float16": 1e12}}, "'float32' among them"),
        ({"flops_per_s": {"float32": "fast"}}, r"flops_per_s\['float32'\]='fast'"),
    ],
)
def test_a_wrong_file_names_the_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(dataclasses.asdict(L4) | change))
    with pytest.raises(OptionError, match=message):
        parse_device(path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(OptionError, match=r"a\.json.*No such file"):
        parse_device(path)
    path.write_text("{")
    with pytest.raises(OptionError, match=r"device file .*a\.json"):
        parse_device(path)
    given = dataclasses.asdict(L4)
    del given["link_latency_s"]
    path.write_text(json.dumps(given))
    with pytest.raises(OptionError, match="'link_latency_s' is missing"):
        parse_device(path)


@pytest.mark.parametrize("device", DEVICES.values())
def test_narrow_types_are_not_slower(device: Device) -> None:
    rates = [device.peak(t) for t in ("float64", "float32", "bfloat16", "float8_e4m3fn")]
    if "float8_e4m3fn" not in device.flops_per_s:
        rates.pop()
    assert rates == sorted(rates)
    assert device.peak("int64") == device.peak("float32")
    assert device.with_tf32().peak("float32") >= device.peak("float32")
    assert device.with_link(1e9, 1e-3).link_latency_s == 1e-3


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA H200", H200),
        ("NVIDIA A100-SXM4-80GB", A100),
        ("NVIDIA L4", L4),
    ],
)
def test_gpus_are_known_by_name(name: str, spec: Device) -> None:
    assert gpu(name) == dataclasses.replace(spec, memory_bytes=32 << 30)


@pytest.mark.parametrize("name", ["Tesla V100-SXM2-32GB", "NVIDIA H100 PCIe", "NVIDIA L40S"])
def test_other_gpus_get_figures_from_their_properties(name: str) -> None:
    """Those of a V100: 15.7 and 125 TFLOP/s, 900 GB/s in its data sheet."""
    spec = gpu(name)
    assert spec.name == name
    assert spec.peak("float32") == pytest.approx(15.4e12, rel=0.01)
    assert spec.peak("float16") == pytest.approx(123e12, rel=0.01)
    assert spec.peak("bfloat16") == spec.peak("float32")
    assert spec.bytes_per_s == pytest.approx(898e9, rel=0.01)


def test_the_device_at_hand_has_its_own_memory() -> None:
    spec = device_spec(torch.device("cpu"))
    assert dataclasses.replace(spec, memory_bytes=CPU.memory_bytes) == CPU
    assert spec.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device_name(torch.device("cpu"))


def test_specifications_need_no_torch() -> None:
    code = "import sys, pipecompile.compiler.costs.hardware; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_run_at_the_peak_of_their_operands(dtype: torch.dtype) -> None:
    node = product(dtype)
    cost = node_cost(node, H100)
    assert cost.flops == node_flops(node) == 2 * 2048**3
    assert cost.moved_bytes == 3 * 2048**2 * dtype.itemsize
    name = short_name(dtype)
    assert cost.seconds == pytest.approx(cost.flops / H100.peak(name) + H100.launch_s)
    assert total_cost([node, node], H100).flops == 2 * cost.flops


def test_a_node_that_was_changed_is_priced_anew() -> None:
    node = product(torch.float32)
    before = node_cost(node, H100)
    other = product(torch.bfloat16)
    node.meta["val"] = other.meta["val"]
    node.all_input_nodes[0].meta["val"] = other.meta["val"]
    assert node_cost(node, H100).seconds < before.seconds


def test_what_takes_the_processor_is_not_hidden() -> None:
    """An exchange beside kernels takes its share of the sender's time, and is never shorter than
    the link needs."""
    free, busy = (dataclasses.replace(DEVICES["cpu"], send_share=share) for share in (0.0, 0.5))
    assert free.together_s(4.0, 2.0) == 4.0
    assert busy.together_s(4.0, 2.0) == 5.0
    assert busy.together_s(1.0, 8.0) == 8.0

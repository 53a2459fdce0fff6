"""What is measured of a device, kept, and made a table of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from pipecompile.compiler.calibration.attention import Attentions
from pipecompile.compiler.calibration.forms import Product
from pipecompile.compiler.calibration.tables import TABLES
from pipecompile.compiler.cli.main import main
from pipecompile.compiler.costs.hardware import CPU, H100, L4
from pipecompile.compiler.profiling import calibrating
from pipecompile.compiler.profiling.calibration import Measured, calibrated, kept

MADE = Measured(
    spec="cpu",
    device="some core",
    threads=torch.get_num_threads(),
    torch=torch.__version__,
    products={"float32": 100e9, "bfloat16": 200e9},
    fill=16.0,
    attention_dtype="float32",
    attention_forward=50e9,
    attention_backward=40e9,
    half_tokens=100.0,
    bytes_per_s=20e9,
    kernel_s=1e-6,
    host_s=0.0,
)


def test_a_device_has_the_table_of_its_name_or_a_generic_one(tmp_path: Path) -> None:
    assert calibrated(H100, tmp_path).table == TABLES["h100"]
    said = calibrated(L4, None).table
    assert said is not None
    assert said.told == "generic efficiency: there is no table for l4"
    own = dataclasses.replace(H100, table=TABLES["a100"])
    assert calibrated(own, tmp_path).table == TABLES["a100"]
    fused = calibrated(H100, None, fused=True).table
    assert fused is not None
    assert fused.fused


def test_what_was_measured_is_found_again(tmp_path: Path) -> None:
    path = MADE.keep(tmp_path)
    assert path is not None
    assert kept("cpu", tmp_path) == MADE
    assert kept("h100", tmp_path) is None
    device = calibrated(CPU, tmp_path)
    assert device.table is not None
    assert device.table.told.startswith("measured on some core with torch ")
    # the peak of the specification was exceeded in fp32, and not in bf16
    assert device.peak("float32") == 100e9
    assert device.table.products.share_of("float32") == 1
    assert device.table.products.share_of("bfloat16") == 200e9 / CPU.peak("bfloat16")
    assert device.table.attention.forward == 0.5
    assert device.bytes_per_s == 20e9
    assert device.table.memory == 1
    large = Product(1, 32 * 100, 32 * 100, 10**6)
    seconds = device.kernel_s(large.flops, 0, "float32", large)
    assert seconds == pytest.approx(large.flops / 100e9, rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [{"version": 0}, {"threads": 99}, {"torch": "1.0"}, {"bytes_per_s": 0}, {"fill": -1}, None],
)
def test_a_file_of_something_else_is_no_file(tmp_path: Path, change: dict[str, object]) -> None:
    path = MADE.keep(tmp_path)
    assert path is not None
    text = "{" if change is None else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text)
    assert kept("cpu", tmp_path) is None


def test_rates_of_two_lengths_tell_where_half_is_reached() -> None:
    curve = Attentions(forward=1.0, backward=0.5, half_width=0.0, half_tokens=300.0)
    forms = calibrating._CPU.attention
    samples: list[calibrating.Sample] = []

    def timed(act: object, device: torch.device) -> float:
        form = dataclasses.replace(forms[len(samples) // 2], backward=bool(len(samples) % 2))
        pairs = form.heads * form.queries * (form.queries + 1) // 2
        flops = (10 if form.backward else 4) * pairs * form.width
        return flops / (1e9 * curve.efficiency(form))

    with mock.patch.object(calibrating, "_seconds", timed):
        given = forms, torch.float32, torch.device("cpu")
        forward, backward, half = calibrating._attention(*given, samples)
    assert (forward, backward, half) == pytest.approx((1e9, 0.5e9, 300))


def test_products_of_several_shapes_tell_rate_and_fill() -> None:
    model = dataclasses.replace(TABLES["a100"].products, fill=128.0)
    times = [(f, model.seconds(f, "", 1e14)) for f in calibrating._CUDA.products]
    fill, rate = calibrating._fitted(TABLES["a100"].products, times)
    assert fill == 128
    assert rate == pytest.approx(0.746e14)


def test_the_command_measures_and_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrating, "WINDOW_S", 1e-4)
    monkeypatch.setattr(calibrating, "LAUNCHES", 50)
    small = dataclasses.replace(
        calibrating._CPU, products=calibrating._CPU.products[-1:], moved_bytes=1 << 20
    )
    monkeypatch.setattr(calibrating, "_CPU", small)
    assert main(["calibrate", "--on", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "float32 products: " in said
    assert str(tmp_path) in said
    found = kept("cpu", tmp_path)
    assert found is not None
    device = found.of(CPU)
    assert device.table is not None
    assert 0 < device.table.attention.backward <= 1
    assert 0 < device.table.memory <= 1
    assert main(["calibrate", "--on", "tpu"]) == 2
    assert "use cpu or cuda" in capsys.readouterr().err

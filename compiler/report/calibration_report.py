"""What `pipecompile calibrate` found, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..costs.hardware import Device
from ..profiling.calibrating import Sample
from ..profiling.calibration import Measured
from .quantities import seconds_text


def calibration_lines(
    measured: Measured, samples: Sequence[Sample], spec: Device, path: Path | None
) -> Iterator[str]:
    """What was measured, sample by sample, what was made of it, and where it is kept."""
    yield f"measured on {measured.device}, torch {measured.torch}, {measured.threads} threads"
    yield ""
    wide = max(len(sample.what) for sample in samples)
    for sample in samples:
        rate = ""
        if sample.flops:
            rate = f"{sample.flops / sample.seconds / 1e9:10.1f} GFLOP/s"
        elif sample.moved_bytes:
            rate = f"{sample.moved_bytes / sample.seconds / 1e9:10.1f} GB/s"
        yield f"  {sample.what:{wide}}  {seconds_text(sample.seconds):>9}  {rate}".rstrip()
    yield ""
    device = measured.of(spec)
    assert device.table is not None
    for dtype in measured.products:
        share = device.table.products.share_of(dtype)
        yield f"  {dtype} products: {share:.0%} of {device.peak(dtype) / 1e9:,.0f} GFLOP/s"
    attention = device.table.attention
    yield f"  attention: {attention.forward:.0%} forward, {attention.backward:.0%} backward"
    yield f"  memory: {device.table.memory:.0%} of {device.bytes_per_s / 1e9:,.1f} GB/s"
    yield ""
    yield "nothing is kept: PIPECOMPILE_CACHE is off" if path is None else f"kept in {path}"

"""What a device was measured to reach, kept on disk, and devices with a table of what they reach.

One file per (device, threads, torch version), in the folder of all that is kept between runs. It is
written whole, and one that is damaged or of another kind is no file.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from ..calibration.tables import table_of
from ..costs.hardware import Device
from ..kept.folder import write

VERSION = 1  # of the format, and of what is measured
MOST_UNFIT = 1e18  # FLOP/s and bytes/s above which a file is not believed


@dataclass(frozen=True)
class Measured:
    """Of one device.

    Attributes:
        spec: the name of its specification (`compiler.costs.hardware`).
        device: what it calls itself.
        products: dtype -> FLOP/s of very large matrix products.
        fill: elements of an inner dimension, as of `Products`.
        attention_dtype: that attention was measured in.
        attention_forward, attention_backward: FLOP/s of attention over very many tokens.
        half_tokens: as of `Attentions`.
        bytes_per_s: of element-wise operators on much memory.
        kernel_s, host_s: as of `Table`.
    """

    spec: str
    device: str
    threads: int
    torch: str
    products: Mapping[str, float]
    fill: float
    attention_dtype: str
    attention_forward: float
    attention_backward: float
    half_tokens: float
    bytes_per_s: float
    kernel_s: float
    host_s: float

    @property
    def file(self) -> str:
        name = "-".join((self.device, str(self.threads), self.torch))
        return f"calibration-{re.sub(r'[^a-zA-Z0-9_.]+', '_', name)}.json"

    def of(self, spec: Device) -> Device:
        """A device whose table has the measured numbers in the places of others. A peak that was
        exceeded is raised: no share is above 1."""
        table = spec.table or table_of(spec.name)
        peaks = {**spec.flops_per_s}
        for dtype, rate in self.products.items():
            peaks[dtype] = max(rate, spec.peak(dtype))
        peak = peaks.get(self.attention_dtype, peaks["float32"])
        width = max(self.bytes_per_s, spec.bytes_per_s)
        share = {dtype: rate / peaks[dtype] for dtype, rate in self.products.items()}
        usual = min(1.0, max(share.values(), default=table.products.share_of("")))
        table = replace(
            table,
            told=f"measured on {self.device} with torch {self.torch}"
            + ("" if self.device.startswith("NVIDIA") else f", {self.threads} threads"),
            products=replace(table.products, share={"": usual} | share, fill=self.fill),
            attention=replace(
                table.attention,
                forward=min(1.0, self.attention_forward / peak),
                backward=min(1.0, self.attention_backward / peak),
                half_tokens=self.half_tokens,
            ),
            memory=self.bytes_per_s / width,
            kernel_s=self.kernel_s,
            host_s=self.host_s,
        )
        return replace(spec, flops_per_s=peaks, bytes_per_s=width, table=table)

    def keep(self, folder: Path | None) -> Path | None:
        """Write it; None where nothing can be kept."""
        if folder is None:
            return None
        path = folder / self.file
        with contextlib.suppress(OSError):
            write(path, json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode())
            return path
        return None


def kept(spec: str, folder: Path | None) -> Measured | None:
    """What was measured last on a device of this specification, with this torch; on a CPU with as
    many threads."""
    found: list[tuple[float, Measured]] = []
    for path in [] if folder is None else folder.glob("calibration-*.json"):
        with contextlib.suppress(OSError):
            measured = _read(path)
            if measured is None or measured.spec != spec or measured.torch != torch.__version__:
                continue
            if spec != "cpu" or measured.threads == torch.get_num_threads():
                found.append((path.stat().st_mtime, measured))
    return max(found, key=lambda each: each[0])[1] if found else None


def calibrated(spec: Device, folder: Path | None, fused: bool = False) -> Device:
    """A device with the best table that there is: its own, one that was measured, that of its name,
    a generic one.

    Args:
        folder: what is kept between runs.
        fused: element-wise operators are compiled together.
    """
    if spec.table is None:
        measured = kept(spec.name, folder)
        spec = replace(spec, table=table_of(spec.name)) if measured is None else measured.of(spec)
    assert spec.table is not None
    return replace(spec, table=replace(spec.table, fused=fused))


def _read(path: Path) -> Measured | None:
    try:
        found = json.loads(path.read_text())
        if found.pop("version") != VERSION:
            return None
        made = Measured(**found)
        numbers = (getattr(made, f.name) for f in fields(Measured) if f.type == "float")
        rates = [*made.products.values(), made.attention_forward, made.attention_backward]
        rates.append(made.bytes_per_s)
        good = all(_is_number(n) and n >= 0 for n in numbers)
        return made if good and all(_is_number(r) and 0 < r < MOST_UNFIT for r in rates) else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

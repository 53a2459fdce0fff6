"""A device as a JSON file describes it."""

from __future__ import annotations

from typing import Any

MINE: dict[str, Any] = {
    "name": "mine",
    "flops_per_s": {"float32": 1e12},
    "bytes_per_s": 1e11,
    "memory_bytes": 1 << 34,
    "link_bytes_per_s": 1e10,
    "link_latency_s": 1e-5,
    "launch_s": 1e-6,
}

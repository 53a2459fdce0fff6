"""When a step begins and ends: by the host's clock, or by events that a device passes."""

from __future__ import annotations

import time
from typing import Any

import torch

Moment = Any
"""As `Stopwatch.now` took it: seconds of the host, or an event."""


class Stopwatch:
    """Takes moments without waiting for a device; what is between two waits for the second."""

    def __init__(self, device: torch.device):
        self._device = device
        self.on_host = device.type != "cuda"

    def now(self) -> Moment:
        if self.on_host:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between_s(self, first: Moment, then: Moment) -> float:
        """Seconds."""
        if self.on_host:
            return float(then - first)
        then.synchronize()
        return float(first.elapsed_time(then)) / 1e3

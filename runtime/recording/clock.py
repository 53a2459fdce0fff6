"""Moments: of the host where it computes, of the stream where a device does."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

Mark = Any
"""A moment, as a clock took it: cheap to take, read when all is over."""


class Clock(Protocol):
    """Takes moments, and says later when they were."""

    memory: str
    """What `held` counts, as in `compiler.trace.trace.Header`."""

    def now(self) -> Mark: ...

    def begin(self) -> None:
        """A step begins."""
        ...

    def settle(self) -> None:
        """Wait until all moments that were taken are past."""
        ...

    def nanoseconds(self, mark: Mark) -> int:
        """When it was, by `time.perf_counter_ns` of this process."""
        ...

    def held(self) -> int | None:
        """Bytes that are held now; None where nothing tells that cheaply."""
        ...


class HostClock:
    """Where the thread that calls an operator computes it."""

    memory = "not measured"

    def now(self) -> Mark:
        return time.perf_counter_ns()

    def begin(self) -> None:
        pass

    def settle(self) -> None:
        pass

    def nanoseconds(self, mark: Mark) -> int:
        return int(mark)

    def held(self) -> int | None:
        """The CPU's allocator keeps no count."""
        return None


class DeviceClock:
    """Events on a CUDA stream: when what was queued before them was done.

    They count from the last one that `begin` took, as milliseconds in a float lose the digits that
    matter within minutes.
    """

    memory = "torch.cuda.memory_allocated"

    def __init__(self, device: torch.device):
        self._device = device
        torch.cuda.synchronize(device)
        self._origin_ns = time.perf_counter_ns()
        self._bases = [self._event()]

    def now(self) -> Mark:
        return len(self._bases) - 1, self._event()

    def begin(self) -> None:
        self._bases.append(self._event())

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)

    def nanoseconds(self, mark: Mark) -> int:
        base, event = mark
        return self._base_ns(base) + _between_ns(self._bases[base], event)

    def held(self) -> int | None:
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        return int(stats["allocated_bytes"]["all"]["current"]) if stats else 0

    def _base_ns(self, base: int) -> int:
        pairs = zip(self._bases[:base], self._bases[1 : base + 1], strict=True)
        return self._origin_ns + sum(_between_ns(first, then) for first, then in pairs)

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def _between_ns(first: torch.cuda.Event, then: torch.cuda.Event) -> int:
    return round(float(first.elapsed_time(then)) * 1e6)


def clock_of(device: torch.device) -> Clock:
    return DeviceClock(device) if device.type == "cuda" else HostClock()

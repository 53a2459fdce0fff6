"""What is compiled for: a device, its rates, its memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..costs.hardware import Device
from ..ir.program import StageProgram
from ..profiling.profile import Profiler


@dataclass(frozen=True)
class Target:
    """What is compiled for.

    Attributes:
        device: where graphs are traced and programs run.
        spec: whose rates prices are taken from.
        budget_bytes: memory of a rank; infinity for no limit.
        whole: that is all that its device has, which takes some of it for itself; ranks on devices
            of several kinds have what each has.
        profilers: kind of device -> measures on one that this process has; "" for the only kind.
            Empty where the device's rates say what it takes.
        roughly: the first division that fits will do, in the order that is made for equal stages:
            the plan's step is no shorter than it can be, and found in a fraction of the time.
    """

    device: torch.device
    spec: Device
    budget_bytes: float = math.inf
    profilers: Mapping[str, Profiler] = field(default_factory=dict)
    whole: bool = False
    roughly: bool = False

    @property
    def measures(self) -> bool:
        """Whether programs are timed."""
        return bool(self.profilers)

    @property
    def runs(self) -> Callable[[StageProgram], StageProgram] | None:
        """`Profiler.runs`; None where nothing is measured."""
        found = (each.runs for each in self.profilers.values())
        return next(found, None)

    @property
    def costs(self) -> str:
        """Where seconds come from."""
        if self.measures:
            return "profile"
        return "roofline" if self.spec.table is None else "calibrated"

    @property
    def kind(self) -> str:
        """ "cpu" or "cuda": what is planned for, if it is not what is at hand."""
        return "cpu" if self.device.type == "cpu" and self.spec.is_cpu else "cuda"

"""Units -> stages: the problem as plain data, its solution, and what makes a solution legal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..compiler.errors import PartitionError
from ..compiler.hardware import Device
from ..compiler.units import Unit


@dataclass(frozen=True)
class Problem:
    """A chain of units to divide into stages; numbers only.

    Attributes:
        unit_s: seconds of each unit's forward and backward, per microbatch.
        cut_s: seconds to move what crosses after each unit, there and its gradient back.
        n_stages, microbatches: S and m of the schedule.
    """

    unit_s: tuple[float, ...]
    cut_s: tuple[float, ...]
    n_stages: int
    microbatches: int

    def stage_s(self, first: int, end: int) -> float:
        """Seconds of a stage with units ``first`` to ``end`` - 1, sending included."""
        last = end == len(self.unit_s)
        return sum(self.unit_s[first:end]) + (0.0 if last else self.cut_s[end - 1])

    def makespan_s(self, stages_s: Sequence[float]) -> float:
        """Of 1F1B: (m − 1) · max T + Σ T (DESIGN: Narayanan et al., SC 2021, section 2.2)."""
        return (self.microbatches - 1) * max(stages_s) + sum(stages_s)


@dataclass(frozen=True)
class Solution:
    """Which units each stage has: stage s has ``starts[s]`` to ``starts[s + 1]`` - 1."""

    starts: tuple[int, ...]
    stages_s: tuple[float, ...]
    makespan_s: float

    def stage_of(self, unit: int) -> int:
        return max(s for s, start in enumerate(self.starts) if start <= unit)


def problem_of(units: Sequence[Unit], device: Device, n_stages: int, microbatches: int) -> Problem:
    """The partitioning problem of a graph's units.

    Raises:
        PartitionError: more stages than units.
    """
    if n_stages > len(units):
        raise PartitionError(
            f"n_stages={n_stages}, but the model has only {len(units)} units (runs of operators "
            f"between good cut points): use n_stages={len(units)} or fewer"
        )
    return Problem(
        tuple(unit.seconds for unit in units),
        tuple(2 * unit.cut_bytes / device.link_bytes_per_s for unit in units),
        n_stages,
        microbatches,
    )

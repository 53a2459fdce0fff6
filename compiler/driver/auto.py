"""n_stages="auto": every way to divide the devices between stages and replicas, and the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..ir.errors import BatchError, MemoryBudgetError, OptionError, PartitionError
from .compiled import Compiled

FINER = (1, 2, 4, 8)


@dataclass(frozen=True)
class Trial:
    """One division of the devices.

    Attributes:
        microbatches: per replica.
        step_s: predicted; None where it cannot be.
        reason: why it cannot be, in one line.
    """

    n_stages: int
    dp: int
    microbatches: int | None
    step_s: float | None
    reason: str = ""

    def __str__(self) -> str:
        what = f"{self.n_stages} × dp {self.dp}"
        return f"{what}: {self.reason}" if self.step_s is None else f"{what}: {self.step_s:.4g} s"


def choose_stages(
    devices: int, build: Callable[[int, int, int], Compiled]
) -> tuple[Trial, tuple[Trial, ...]]:
    """Try every divisor of the device count as number of stages.

    Args:
        build: (n_stages, dp, n) -> the compiled step of one and the same global batch, cut into
            n times as many microbatches as usual.

    Returns:
        The division with the shortest predicted step, and all that were tried.

    Raises:
        OptionError: none is possible; with the reason of each.
    """
    trials = [_tried(s, devices // s, build) for s in range(1, devices + 1) if devices % s == 0]
    possible = [trial for trial in trials if trial.step_s is not None]
    if not possible:
        raise OptionError(
            f'n_stages="auto": no division of {devices} devices is possible: {listed(trials)}'
        )
    return min(possible, key=lambda trial: trial.step_s or 0.0), tuple(trials)


def listed(trials: Sequence[Trial]) -> str:
    return "; ".join(map(str, trials))


def _tried(n_stages: int, dp: int, build: Callable[[int, int, int], Compiled]) -> Trial:
    """One division; with finer microbatches where it does not fit into memory otherwise."""
    reason = ""
    for finer in FINER:
        try:
            plan = build(n_stages, dp, finer).plan
        except MemoryBudgetError as error:
            reason = reason or " ".join(str(error).split())
        except (BatchError, PartitionError, OptionError) as error:
            reason = reason or " ".join(str(error).split())
            break
        else:
            return Trial(n_stages, dp, plan.microbatches, plan.step_s)
    return Trial(n_stages, dp, None, None, reason)

"""The exact mode of `zb`, for small pipelines: the best schedule there is, proven by a solver."""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler.ir.actions import Schedule
from ..sequencing.exact import proven
from ..sequencing.search import check_limits
from .sequenced import order_of, problem_of, schedule_of
from .shape import PipelineShape
from .zb import zb


@dataclass(frozen=True)
class Exact:
    """What the search and the solver have found, in seconds of what counts.

    Attributes:
        schedule: the best one.
        found_s: what the search's takes.
        seconds: what the best one takes.
        bound_s: none takes less; the same where the solver has finished.
    """

    schedule: Schedule
    found_s: float
    seconds: float
    bound_s: float

    @property
    def gap(self) -> float:
        """By how much the search may be above the best there is, as a part of that."""
        return self.found_s / self.bound_s - 1 if self.bound_s else float("inf")


def zb_exact(shape: PipelineShape, time_limit_s: float = 60.0) -> Exact:
    """Starts from what `zb` finds; with any placement.

    Raises:
        OptionError: a rank's limit is less than one microbatch takes.
        ValueError: there is too much to prove.
    """
    problem = problem_of(shape, None if shape.costs else shape.ranks)
    check_limits(problem)
    order = order_of(zb(shape))
    proof = proven(problem, order, time_limit_s)
    return Exact(schedule_of(proof.order), proof.start_s, proof.seconds, proof.bound_s)

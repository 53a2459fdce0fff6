"""The schedules that can be asked for: all that is known of one stands here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...compiler.ir.actions import Schedule
from .one_f_one_b import one_f_one_b
from .zb_h1 import zb_h1


@dataclass(frozen=True)
class ScheduleKind:
    """A way to order the microbatches.

    Attributes:
        help: what it is for, after its name.
        generate: (stages, microbatches, per stage whether its backward is split) -> the compute
            actions.
        longest: (stage, stages, whether its backward is split) -> the most microbatches that the
            stage ever holds between their forward and their last backward.
        splits_backward: whether the weight gradients that no other stage waits for are made a
            program of their own.
    """

    name: str
    help: str
    generate: Callable[[int, int, Sequence[bool]], Schedule]
    longest: Callable[[int, int, bool], int]
    splits_backward: bool = False

    def in_flight(
        self, n_stages: int, microbatches: int, splits: Sequence[bool] | None = None
    ) -> tuple[int, ...]:
        """Per stage, the most microbatches that it holds at once.

        Args:
            splits: per stage; None where that is not known: as the schedule would have it.
        """
        split = splits or (self.splits_backward,) * n_stages
        return tuple(
            min(self.longest(stage, n_stages, split[stage]), microbatches)
            for stage in range(n_stages)
        )


SCHEDULES: Mapping[str, ScheduleKind] = {
    kind.name: kind
    for kind in (
        ScheduleKind(
            "1f1b",
            "few microbatches in flight",
            lambda stages, microbatches, _: one_f_one_b(stages, microbatches),
            lambda stage, stages, _: stages - stage,
        ),
        ScheduleKind(
            "zb_h1",
            "weight gradients later than what other stages wait for, for a smaller bubble",
            zb_h1,
            lambda stage, stages, split: stages if split else stages - stage,
            splits_backward=True,
        ),
    )
}
DEFAULT = "1f1b"

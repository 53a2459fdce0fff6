"""The schedules that can be asked for: all that is known of one stands here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...compiler.ir.actions import Schedule
from .load import Load, load_of
from .one_f_one_b import one_f_one_b
from .shape import Homes, PipelineShape, StageCosts, looped
from .zb_h1 import zb_h1


@dataclass(frozen=True)
class ScheduleKind:
    """A way to order the microbatches.

    Attributes:
        help: what it is for, after its name.
        generate: the compute actions for a shape.
        splits_backward: whether the weight gradients that no other stage waits for are made a
            program of their own.
        place: (ranks, stages per rank) -> where stages are.
        virtual: how many stages a rank may hold; None for any number from 1 on. The first is what
            it holds where nothing is said.
        searches: whether the order depends on seconds and bytes.
    """

    name: str
    help: str
    generate: Callable[[PipelineShape], Schedule]
    splits_backward: bool = False
    place: Callable[[int, int], Homes] = looped
    virtual: tuple[int, ...] | None = (1,)
    searches: bool = False

    def shape(
        self,
        ranks: int,
        microbatches: int,
        virtual: int | None = None,
        splits: Sequence[bool] | None = None,
        costs: StageCosts | None = None,
    ) -> PipelineShape:
        """What to generate it for.

        Args:
            virtual: stages per rank; None for what is usual.
            splits: per stage; None where that is not known: as the schedule would have it.
        """
        homes = self.place(ranks, virtual or self.usual_virtual)
        split = tuple(splits or (self.splits_backward,) * len(homes))
        return PipelineShape(homes, microbatches, split, costs)

    @property
    def usual_virtual(self) -> int:
        return self.virtual[0] if self.virtual else 1

    def load(self, shape: PipelineShape) -> Load:
        """What ranks hold, and when they are idle, if all stages are alike."""
        return _load(self, shape.homes, shape.microbatches, shape.splits)

    def in_flight(self, shape: PipelineShape) -> tuple[int, ...]:
        """Per stage, the most microbatches between their forward and their last backward."""
        return self.load(shape).in_flight


@lru_cache(256)
def _load(kind: ScheduleKind, homes: Homes, microbatches: int, splits: tuple[bool, ...]) -> Load:
    shape = PipelineShape(homes, microbatches, splits)
    return load_of(kind.generate(shape), shape)


SCHEDULES: Mapping[str, ScheduleKind] = {
    kind.name: kind
    for kind in (
        ScheduleKind("1f1b", "few microbatches in flight", one_f_one_b),
        ScheduleKind(
            "zb_h1",
            "weight gradients later than what other stages wait for, for a smaller bubble",
            zb_h1,
            splits_backward=True,
        ),
    )
}
DEFAULT = "1f1b"

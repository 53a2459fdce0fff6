"""The schedules that can be asked for: all that is known of one stands here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ...compiler.ir.actions import Schedule
from ..generators.gpipe import gpipe
from ..generators.interleaved import interleaved
from ..generators.one_f_one_b import one_f_one_b
from ..generators.shape import Homes, PipelineShape, StageCosts, looped, v_shaped
from ..generators.v_blocks import v_half, v_min
from ..generators.zb import zb
from ..generators.zb_h1 import zb_h1
from ..generators.zb_v import zb_v
from .load import Load, load_of


@dataclass(frozen=True)
class ScheduleKind:
    """A way to order the microbatches.

    Attributes:
        help: what it is for, after its name.
        generate: the compute actions for a shape.
        splits_backward: whether the weight gradients that no other stage waits for are made a
            program of their own.
        place: (ranks, stages per rank) -> where stages are.
        virtual: how many stages a rank may hold; None for any number from 1 on.
        usual_virtual: what it holds where nothing is said.
        searches: whether the order depends on seconds and bytes.
        takes_limit: whether ranks may hold as much as is allowed, and not what the kind says.
        fixed: whether it is for one number of ranks and microbatches alone.
    """

    name: str
    help: str
    generate: Callable[[PipelineShape], Schedule]
    splits_backward: bool = False
    place: Callable[[int, int], Homes] = looped
    virtual: tuple[int, ...] | None = (1,)
    usual_virtual: int = 1
    searches: bool = False
    takes_limit: bool = False
    fixed: bool = False

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

    def order(self, shape: PipelineShape) -> Schedule:
        """The compute actions; those of stages that are all alike are made once."""
        if shape.costs is not None:
            return self.generate(shape)
        return _alike(self, shape)

    def load(self, shape: PipelineShape) -> Load:
        """What ranks hold, and when they are idle, if all stages are alike."""
        return _load(self, replace(shape, costs=None))

    def in_flight(self, shape: PipelineShape) -> tuple[int, ...]:
        """Per stage, the most microbatches between their forward and their last backward."""
        return self.load(shape).in_flight


@lru_cache(1024)
def _load(kind: ScheduleKind, shape: PipelineShape) -> Load:
    return load_of(kind.order(shape), shape)


@lru_cache(64)  # a search asks for the same ones of many ways
def _alike(kind: ScheduleKind, shape: PipelineShape) -> Schedule:
    return kind.generate(shape)


def _in_a_v(name: str, text: str, generate: Callable[[PipelineShape], Schedule]) -> ScheduleKind:
    """Two stages per rank, put in order by a search within the memory that the kind has."""
    return ScheduleKind(
        name,
        text,
        generate,
        splits_backward=True,
        place=v_shaped,
        virtual=(2,),
        usual_virtual=2,
        searches=True,
    )


SCHEDULES: Mapping[str, ScheduleKind] = {
    kind.name: kind
    for kind in (
        ScheduleKind(
            "gpipe", "all forwards, then all backwards: simple, much memory", gpipe, virtual=None
        ),
        ScheduleKind("1f1b", "few microbatches in flight", one_f_one_b),
        ScheduleKind(
            "interleaved",
            "1f1b over several stages per rank, for a smaller bubble and more messages",
            interleaved,
            virtual=None,
            usual_virtual=2,
        ),
        ScheduleKind(
            "zb_h1",
            "weight gradients later than what other stages wait for, for a smaller bubble",
            zb_h1,
            splits_backward=True,
        ),
        ScheduleKind(
            "zb",
            "the best order found for these stages, with weight gradients apart",
            zb,
            splits_backward=True,
            virtual=None,
            searches=True,
            takes_limit=True,
        ),
        _in_a_v(
            "zb_v", "two stages per rank in a V: almost no bubble with the memory of 1f1b", zb_v
        ),
        _in_a_v(
            "v_half", "the same with half of the memory, and half of the bubble of 1f1b", v_half
        ),
        _in_a_v(
            "v_min",
            "the same with a third of the memory, and two thirds of the bubble of 1f1b",
            v_min,
        ),
    )
}
DEFAULT = "1f1b"

"""What a schedule is made for: ranks that hold stages, microbatches, and what these take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from ...compiler.ir.actions import Action, Kind, Schedule, placement_of

Homes = tuple[int, ...]
"""Per stage, the rank that holds it."""


def looped(ranks: int, virtual: int) -> Homes:
    """Stage s is on rank s mod p: with p = 3 ranks and 2 stages on each, 0 1 2 0 1 2."""
    return tuple(range(ranks)) * virtual


def v_shaped(ranks: int, virtual: int) -> Homes:
    """There and back: with p = 3 ranks and 2 stages on each, 0 1 2 2 1 0."""
    there = tuple(range(ranks))
    return tuple(r for i in range(virtual) for r in (there[::-1] if i % 2 else there))


@dataclass(frozen=True)
class StageCosts:
    """What one microbatch takes on each stage, for schedules that are searched.

    Attributes:
        forward_s, backward_s, weight_s: seconds; ``weight_s`` is 0 where nothing is split off.
        stash_bytes: held from the forward to the end of the backward.
        carry_bytes: held from there to the end of the weight gradients: what these read.
        transfer_s: (stage, stage) -> seconds that a message is under way; 0 where not given.
        limit_bytes: per rank, for what microbatches hold at once; infinity, or none, for no limit.
        by_end: a step is over when the last rank has ended, since ranks wait for each other
            before they go on; otherwise when each has, and the longest span of a rank counts.
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    weight_s: tuple[float, ...]
    stash_bytes: tuple[float, ...]
    carry_bytes: tuple[float, ...]
    transfer_s: Mapping[tuple[int, int], float] = field(
        default_factory=lambda: MappingProxyType({})
    )
    limit_bytes: tuple[float, ...] = ()
    by_end: bool = False

    @staticmethod
    def of(
        compute_s: Mapping[tuple[int, Kind], float],
        transfer_s: Mapping[tuple[int, int], float],
        stash_bytes: Sequence[float],
        carry_bytes: Sequence[float],
    ) -> StageCosts:
        """From seconds of (stage, kind), for a step that ends with its last rank; no limit."""
        stages = range(len(stash_bytes))
        forward, backward, weight = (
            tuple(compute_s[s, kind] for s in stages) for kind in (Kind.F, Kind.B, Kind.W)
        )
        bytes_ = tuple(stash_bytes), tuple(carry_bytes)
        return StageCosts(forward, backward, weight, *bytes_, transfer_s, by_end=True)


@dataclass(frozen=True)
class PipelineShape:
    """A replica's pipeline.

    Attributes:
        homes: per stage, its rank; ranks are 0 to p − 1, and none is without a stage.
        splits: per stage, whether its backward is split into B and W.
        costs: None where nothing is known: then all stages are alike, and B and W each take as
            long as F.
        rough: an order that is searched is not to be run, but to tell what such a one takes: less
            is looked at for it.
    """

    homes: Homes
    microbatches: int
    splits: tuple[bool, ...]
    costs: StageCosts | None = None
    rough: bool = False

    @property
    def ranks(self) -> int:
        return max(self.homes) + 1

    @property
    def n_stages(self) -> int:
        return len(self.homes)

    @property
    def virtual(self) -> int:
        """How many stages a rank holds."""
        return self.n_stages // self.ranks

    def mates(self, stage: int) -> tuple[int, ...]:
        """The stages of a stage's rank, itself too."""
        return self.placement[self.homes[stage]]

    @property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        """Per rank, its stages in order."""
        return placement_of(self.homes)


def with_weights(schedule: Schedule, splits: Sequence[bool]) -> Schedule:
    """W straight after each B of the stages that have one."""
    return tuple(
        tuple(
            each
            for action in actions
            for each in (
                (action, Action(action.stage, Kind.W, action.microbatch))
                if action.kind is Kind.B and splits[action.stage]
                else (action,)
            )
        )
        for actions in schedule
    )


def usual_limits(shape: PipelineShape, costs: StageCosts) -> tuple[float, ...]:
    """Per rank, what 1F1B would hold on the fullest one, if the stages of each were one.

    Where recomputation leaves more to W than to B, that counts.
    """
    sizes = [max(pair) for pair in zip(costs.stash_bytes, costs.carry_bytes, strict=True)]
    wholes = [math.fsum(sizes[s] for s in mine) for mine in shape.placement]
    ranks, m = shape.ranks, shape.microbatches
    most = max(min(ranks - rank, m) * whole for rank, whole in enumerate(wholes))
    return tuple(max(most, whole) for whole in wholes)

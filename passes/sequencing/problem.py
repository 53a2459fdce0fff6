"""What is to be put in order: F, B and W of every stage and microbatch, on ranks that hold stages.

F of stage s waits for F of stage s − 1; B for F of its own stage and for B of stage s + 1; W for B
of its own. What is sent from one rank to another is under way for a while. A rank does one thing
at a time, and each kind of a stage runs its microbatches in order.

A stage holds ``stash_bytes`` from the start of F to the end of B, and ``carry_bytes`` from there to
the end of W. What the stages of a rank hold together stays within its limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from ...compiler.ir.actions import placement_of

F, B, W = range(3)
Step = tuple[int, int, int]
"""(kind, stage, microbatch)"""
Order = tuple[tuple[Step, ...], ...]
"""Per rank, what it does in order."""


@dataclass(frozen=True)
class Problem:
    """Seconds and bytes are per microbatch, and one entry per stage.

    Attributes:
        homes: per stage, its rank.
        splits: per stage, whether it has a W; where it has none, what is said of W does not count.
        limit_bytes: per rank.
        transfers: (stage, stage, seconds); 0 where not given, and between stages of one rank.
            Stages that are not neighbours wait for each other where they are given.
        by_end: the ranks stop together, so the last end counts, and not the longest rank.
    """

    homes: tuple[int, ...]
    microbatches: int
    splits: tuple[bool, ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    weight_s: tuple[float, ...]
    stash_bytes: tuple[float, ...]
    carry_bytes: tuple[float, ...]
    limit_bytes: tuple[float, ...]
    transfers: tuple[tuple[int, int, float], ...] = ()
    by_end: bool = False

    @property
    def n_stages(self) -> int:
        return len(self.homes)

    @cached_property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        """Per rank, its stages in order."""
        return placement_of(self.homes)

    @property
    def steps(self) -> int:
        """How many an order has."""
        return self.microbatches * (2 * self.n_stages + sum(self.splits))

    @cached_property
    def seconds(self) -> tuple[tuple[float, ...], ...]:
        """[kind][stage]"""
        return self.forward_s, self.backward_s, self.weight_s

    @cached_property
    def carried(self) -> tuple[float, ...]:
        """Per stage, what is held between B and W."""
        pairs = zip(self.carry_bytes, self.splits, strict=True)
        return tuple(carry if split else 0.0 for carry, split in pairs)

    @cached_property
    def before(self) -> tuple[tuple[tuple[tuple[int, float], ...], ...], ...]:
        """[F or B][stage] -> the stages whose results it reads, and how long these are under way.

        The neighbour is the last of them: what others make for it is made before.
        """
        seconds = {(a, b): under_way for a, b, under_way in self.transfers}
        near = {(s, s + d) for s in range(self.n_stages) for d in (1, -1)}
        pairs = {pair for pair in near | set(seconds) if pair[0] != pair[1]}
        found: tuple[list[list[tuple[int, float]]], ...] = tuple(
            [[] for _ in self.homes] for _ in (F, B)
        )
        for a, b in sorted(pairs, key=lambda pair: (-abs(pair[0] - pair[1]), pair)):
            if 0 <= b < self.n_stages:
                apart = self.homes[a] != self.homes[b]
                under_way = seconds.get((a, b), 0.0) if apart else 0.0
                found[F if a < b else B][b].append((a, under_way))
        return tuple(tuple(map(tuple, rows)) for rows in found)

    @cached_property
    def whole_bytes(self) -> tuple[float, ...]:
        """Per rank, what all its stages stash of one microbatch."""
        return tuple(sum(self.stash_bytes[s] for s in stages) for stages in self.placement)

    @cached_property
    def excess_bytes(self) -> tuple[float, ...]:
        """Per rank, by how much a B may raise what it holds: where more is carried than stashed."""
        more = [b - a for a, b in zip(self.stash_bytes, self.carried, strict=True)]
        return tuple(max(0.0, *(more[s] for s in stages)) for stages in self.placement)

    @cached_property
    def least_bytes(self) -> tuple[float, ...]:
        """Per rank, what it takes to run one microbatch after the other."""
        found = []
        for stages, peak in zip(self.placement, self.whole_bytes, strict=True):
            below = 0.0
            for s in stages:
                peak = max(peak, below + self.carried[s])
                below += self.stash_bytes[s]
            found.append(peak)
        return tuple(found)

    def fits(self, order: Order) -> bool:
        return all(self.fits_rank(rank, steps) for rank, steps in enumerate(order))

    def fits_rank(self, rank: int, steps: Iterable[Step]) -> bool:
        return self.peak_bytes(steps) <= allowed(self.limit_bytes[rank])

    def peak_bytes(self, steps: Iterable[Step]) -> float:
        """The most that a rank holds at once.

        Counts times bytes: sums that are never off by what was added and taken away before.
        """
        stashed, carried = [0] * self.n_stages, [0] * self.n_stages
        touched: dict[int, None] = {}
        peak = 0.0
        for kind, stage, _ in steps:
            touched[stage] = None
            stashed[stage] += (1, -1, 0)[kind]
            carried[stage] += (0, 1, -1)[kind]
            held = 0.0
            for s in touched:
                held += stashed[s] * self.stash_bytes[s] + carried[s] * self.carried[s]
            peak = max(peak, held)
        return peak


def allowed(limit: float) -> float:
    """A limit in bytes, which sums of fractions may miss by a rounding."""
    return limit if math.isinf(limit) else limit * (1 + 1e-12)


def without_weights(order: Order) -> Order:
    return tuple(tuple(step for step in steps if step[0] != W) for steps in order)

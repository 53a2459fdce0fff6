"""Which unit goes to which stage and what it recomputes: what ranks share and plans keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..ir.zero import Kept


@dataclass(frozen=True)
class Search:
    """What the solver knows of a decision.

    Attributes:
        objective_s, bound_s: seconds of a step, as the partitioning problem prices it.
        proven: no better one exists.
        solver: what found it.
        note: a time limit, a fallback.
        seconds: that the search took.
    """

    objective_s: float
    bound_s: float
    proven: bool
    solver: str
    note: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def gap(self) -> float:
        return (self.objective_s - self.bound_s) / self.objective_s if self.objective_s else 0.0


@dataclass(frozen=True)
class Decision:
    """Stages and recomputation of one joint graph.

    Attributes:
        fingerprint: of the graph.
        unit_nodes: how many forward nodes each unit has, in execution order.
        unit_stage: the stage of each unit.
        unit_recomputes: what each unit recomputes, for people.
        unit_seconds: of a microbatch: forward, backward, recomputation.
        recomputed: names of the forward nodes that the backward computes again.
        chunk_rows: of how many tokens logits exist at once, where losses are computed in pieces; 0
            where logits are whole.
        kept: per stage, what its rank keeps whole over a step, of what replicas divide; empty where
            nothing is kept.
        devices: the name of that of each rank of a replica; empty where all are of one kind that
            nobody has counted.
        order_note: why these, in this order.
        weight_shares: per stage, how much of the backward its weight gradients take that are split
            off; empty where nobody measured it.
    """

    fingerprint: str
    unit_nodes: tuple[int, ...]
    unit_stage: tuple[int, ...]
    unit_recomputes: tuple[str, ...]
    unit_seconds: tuple[tuple[float, float, float], ...]
    recomputed: tuple[str, ...]
    search: Search
    chunk_rows: int = 0
    kept: tuple[Kept, ...] = ()
    devices: tuple[str, ...] = ()
    order_note: str = ""
    weight_shares: tuple[float, ...] = ()

    @property
    def stages_and_seconds(self) -> list[tuple[int, tuple[float, float, float]]]:
        """Per unit; nothing where no unit has seconds."""
        return list(zip(self.unit_stage, self.unit_seconds, strict=False))

    def scaled(self, stages_s: Mapping[int, tuple[float, float, float]]) -> Decision:
        """With seconds that add up to those of the stages: forward, all of the backward, and of it
        the weight gradients that are split off."""
        pairs = self.stages_and_seconds
        seconds: list[tuple[float, float, float]] = []
        for stage, unit in pairs:
            mine = [other for s, other in pairs if s == stage]
            forward = stages_s[stage][0] / (math.fsum(f for f, _, _ in mine) or 1.0)
            backward = stages_s[stage][1] / (math.fsum(b + r for _, b, r in mine) or 1.0)
            seconds.append((unit[0] * forward, unit[1] * backward, unit[2] * backward))
        shares = [weight / (all_ or 1.0) for _, (_, all_, weight) in sorted(stages_s.items())]
        return replace(self, unit_seconds=tuple(seconds), weight_shares=tuple(shares))

    def check(self, n_stages: int) -> None:
        """Raises ValueError where the parts do not fit together."""
        lists = (self.unit_nodes, self.unit_stage, self.unit_recomputes, self.unit_seconds)
        if len({len(each) for each in lists}) > 1:
            raise ValueError("its lists of units differ in length")
        if self.weight_shares and len(self.weight_shares) != n_stages:
            raise ValueError(f"it has shares of {len(self.weight_shares)} of {n_stages} stages")
        if self.kept and len(self.kept) != n_stages:
            raise ValueError(f"it keeps parameters for {len(self.kept)} of {n_stages} stages")
        if not set(self.unit_stage) <= set(range(n_stages)) or min(self.unit_nodes, default=1) < 1:
            raise ValueError(f"units are on stages {sorted(set(self.unit_stage))} of {n_stages}")

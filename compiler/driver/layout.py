"""Where the parts of a model are: what its first graph decided, and its other graphs follow."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import fx

from ...passes.graph.placement import Placement, Site, follow, sites_of
from ..capture.batch import BatchSpec
from ..ir.actions import Pace
from ..ir.errors import CaptureError, MemoryBudgetError
from ..ir.graph import JointGraph, Phase, phase_of
from ..ir.locality import Locality
from ..ir.program import PipelineProgram
from ..ir.shards import homes_in
from ..ir.zero import NOTHING, Kept, Zero
from ..plan.decision import Decision, Search
from ..plan.plan import Plan
from ..planning.advice import gib


@dataclass(frozen=True)
class Layout:
    """What all graphs of one model share.

    Attributes:
        sites: where in the model an operator is -> its stage.
        recomputed: the sites that the backward computes again.
        homes: parameter FQN -> the stages that hold it.
        zero: what replicas divide among themselves.
        kept: per stage, what its rank keeps whole of that; empty for nothing.
        pace: how the first graph runs.
        chunk_rows: of how many tokens logits exist at once; 0 where they are whole.
        tables: FQNs of the parameters of which replicas exchange touched rows alone.
        stepped_rows: FQNs of those of which the optimizer is given these rows alone.
        devices: of the ranks, as a decision has them.
    """

    sites: Mapping[Site, int]
    recomputed: frozenset[Site]
    homes: Mapping[str, tuple[int, ...]]
    zero: Zero
    pace: Pace
    chunk_rows: int = 0
    kept: tuple[Kept, ...] = ()
    tables: frozenset[str] = frozenset()
    stepped_rows: frozenset[str] = frozenset()
    devices: tuple[str, ...] = ()

    def kept_on(self, stage: int) -> Kept:
        """What the rank of a stage keeps whole over a step."""
        return self.kept[stage] if self.kept else NOTHING

    def check(self, updated: Collection[str]) -> None:
        """Raises CaptureError where forward updates a parameter that has a home."""
        for name in sorted(set(updated).intersection(self.homes)):
            raise CaptureError(
                f"forward updates parameter {name!r} here, and in the first graph it did not: make "
                "it a buffer (register_buffer)"
            )

    def follow(
        self, graph: JointGraph, locality: Locality
    ) -> tuple[Decision, Placement, frozenset[fx.Node]]:
        """Stages and recomputation of another graph of the model, operator by operator."""
        placement = follow(graph, locality, self.sites, self.homes)
        again = frozenset(n for n, s in sites_of(locality) if s in self.recomputed and graph.trains)
        stages = [placement.stage[n] for n in locality.staged if phase_of(n) is Phase.FORWARD]
        decision = Decision(
            graph.fingerprint(),
            (1,) * len(stages),
            tuple(stages),
            ("nothing",) * len(stages),
            (),
            tuple(sorted(node.name for node in again)),
            Search(0.0, 0.0, True, "the first graph"),
            kept=self.kept,
            devices=self.devices,
        )
        return decision, placement, again


def layout_of(
    placement: Placement,
    again: Collection[fx.Node],
    locality: Locality,
    program: PipelineProgram,
    params: Collection[str],
    zero: Zero,
    pace: Pace,
    decision: Decision,
    tables: frozenset[str] = frozenset(),
    stepped_rows: frozenset[str] = frozenset(),
) -> Layout:
    """What the first graph has settled.

    Args:
        again: the forward nodes that the backward computes again.
        params: the FQNs of the model.
        tables, stepped_rows: as a layout has them.
    """
    sites = frozenset(site for node, site in sites_of(locality) if node in again)
    homes = homes_in(program, params)
    kept = decision.chunk_rows, decision.kept, tables, stepped_rows, decision.devices
    return Layout(placement.sites, sites, homes, zero, pace, *kept)


def check_memory(plan: Plan, spec: BatchSpec) -> None:
    """Raises MemoryBudgetError where the stages of another graph do not fit with this one.

    Args:
        plan: of a graph that follows another one.
        spec: of its microbatch.
    """
    limits = [plan.limit_of(each) for each in plan.stages]
    over = tuple(
        -math.inf if limit is None else each.memory.needed - limit
        for each, limit in zip(plan.stages, limits, strict=True)
    )
    worst = max(plan.stages, key=lambda each: over[each.stage])
    if over[worst.stage] <= 0:
        return
    raise MemoryBudgetError(
        f"a microbatch of ({spec}) would need {gib(worst.memory.needed)} on stage {worst.stage}, "
        f"in {worst.memory.peak_at}, which is {gib(over[worst.stage])} more than there is "
        f"(memory={gib(limits[worst.stage] or 0)}): stages and what they recompute were chosen "
        "for the first batch. Give the largest one as example_batch=, or smaller batches",
        tuple(max(0.0, each) for each in over),
        None,
        proven=False,
    )

"""Schedules that are searched: the shape of a pipeline as a problem, an order as a schedule."""

from __future__ import annotations

import math

from ...compiler.ir.actions import Action, Kind, Schedule
from ..sequencing import search
from ..sequencing.problem import Order, Problem
from .shape import PipelineShape

KINDS = (Kind.F, Kind.B, Kind.W)
UNKNOWN_PART = 10  # of the effort, where all stages are alike and there is little to find
ROUGH_PART = 3  # of that, where the order is not to be run


def problem_of(shape: PipelineShape, most: int | None = None) -> Problem:
    """What is to be put in order.

    Where costs are not known, F, B and W take as long, and B without W as long as both; what a
    rank holds of a microbatch, it holds until the last of these.

    Args:
        most: microbatches of all its stages that a rank may hold, beside its limit in bytes.
    """
    costs, n = shape.costs, shape.n_stages
    if costs is None:
        transfers: tuple[tuple[int, int, float], ...] = ()
        backward_s = tuple(1.0 if split else 2.0 for split in shape.splits)
        ones = (1.0,) * n
        seconds = (ones, backward_s, ones)
        sizes = (ones, ones)
    else:
        transfers = tuple((a, b, s) for (a, b), s in sorted(costs.transfer_s.items()))
        seconds = (costs.forward_s, costs.backward_s, costs.weight_s)
        sizes = (costs.stash_bytes, costs.carry_bytes)
    limits = costs.limit_bytes if costs and costs.limit_bytes else (math.inf,) * shape.ranks
    if most is not None:
        whole = [max(a, b if x else 0.0) for a, b, x in zip(*sizes, shape.splits, strict=True)]
        held = (most * sum(whole[s] for s in stages) for stages in shape.placement)
        limits = tuple(map(min, limits, held))
    by_end = costs is not None and costs.by_end
    return Problem(
        shape.homes, shape.microbatches, shape.splits, *seconds, *sizes, limits, transfers, by_end
    )


def effort_of(shape: PipelineShape) -> int:
    """How many steps to simulate."""
    effort = search.EFFORT // (1 if shape.costs else UNKNOWN_PART)
    return effort // ROUGH_PART if shape.rough else effort


def order_of(schedule: Schedule) -> Order:
    return tuple(
        tuple((KINDS.index(a.kind), a.stage, a.microbatch or 0) for a in actions)
        for actions in schedule
    )


def schedule_of(order: Order) -> Schedule:
    return tuple(
        tuple(Action(stage, KINDS[kind], i) for kind, stage, i in steps) for steps in order
    )

"""What reports say of one thing in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..plan.plan import MemoryPlan, Plan, StagePlan, TiedPlan, Transfer
from .quantities import bytes_text, counted, seconds_text

if TYPE_CHECKING:
    from .compare import Comparison

SHOWN_VALUES = 4  # of a message


def sent_bytes(stage: StagePlan) -> int:
    return sum(message.bytes for message in stage.sends)


def stage_seconds(stage: StagePlan) -> float:
    return stage.forward_s + stage.backward_s + stage.recompute_s


def working_bytes(m: MemoryPlan) -> int:
    """What is held at the peak beyond what is held all the time."""
    held = m.weights + m.copies + m.grads + m.states + m.buffers + m.constants + m.batch
    return m.peak - held - m.residue


def recomputes_text(stage: StagePlan) -> str:
    """What a stage recomputes, of most units first; "" for nothing."""
    most = sorted(stage.recomputes.items(), key=lambda item: -item[1])
    return "; ".join(f"{label} of {counted(n, 'unit')}" for label, n in most)


def recomputed_text(stage: StagePlan) -> str:
    whole = stage_seconds(stage)
    return (
        f"stage {stage.stage}: {recomputes_text(stage)} (of {stage.units}): "
        f"{seconds_text(stage.recompute_s)}, "
        f"{stage.recompute_s / whole if whole else 0:.1%} of its time"
    )


def verdict_text(step_s: float, chosen: bool, best_s: float) -> str:
    """Of a way whose step is known; ``chosen``: the plan is it."""
    if chosen and step_s <= best_s:
        return "chosen"
    ratio = f"{step_s / best_s:.2f} ×" if best_s else "–"
    return f"this: {ratio}" if chosen else ratio


def tied_text(tied: TiedPlan, plan: Plan) -> str:
    aliases = "".join(f" = {name}" for name in tied.names if name != tied.name)
    where = ", ".join(map(str, tied.stages))
    ranks = {plan.stages[stage].rank for stage in tied.stages}
    amount = f"{len(ranks) - 1} × {bytes_text(tied.part_bytes)}"
    head = f"{tied.name}{aliases}: on stages {where}, owned by {tied.owner}; the parts of its "
    if len(ranks) == 1:
        return f"{head.removesuffix('; the parts of its ')}, which are on one rank: nothing is sent"
    if tied.summed == "per_step":
        return f"{head}gradient are sent once per step ({amount}), and the sum back"
    return (
        f"{head}gradient are sent with every microbatch ({amount}), and the sum back once per "
        'step; tied_grads="per_step" sends less, but is no longer bit-exact'
    )


def values_text(message: Transfer) -> str:
    shown = ", ".join(message.values[:SHOWN_VALUES])
    more = len(message.values) - SHOWN_VALUES
    return f"{shown} and {more} more" if more > 0 else shown


def fit_text(row: Comparison, limited: bool) -> str:
    if row.reason or not limited:
        return "–"
    return "yes" if row.fits else bytes_text(row.over_bytes)

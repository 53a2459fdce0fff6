"""The sentence that a report begins with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...passes.schedule.simulate import Timeline
from ..plan.plan import Plan, StagePlan
from ..report.quantities import bytes_text, rate_text, seconds_text
from .limits import limits_of

FULL = 0.9  # of a rank's memory: what is not modelled may take the rest
NOTABLE = 0.1  # of the step: what is named beside the largest


@dataclass(frozen=True)
class Change:
    """Another plan for the same batch and devices.

    Attributes:
        flags: as they are given.
        step_s, instead_of_s: of it and of the plan, both simulated.
    """

    flags: str
    step_s: float
    instead_of_s: float


@dataclass(frozen=True)
class Judged:
    """What a verdict is made from.

    Attributes:
        plan: that is shown.
        real, timeline: the same stages and actions in the seconds that come nearest to a clock's.
        bound_s: of the step, at peak rates.
        peak_flops_per_s: of one device, in the dtype that is computed in.
        change: the best that was found; None for none.
        tried: whether any was tried.
    """

    plan: Plan
    real: Plan
    timeline: Timeline
    bound_s: float
    peak_flops_per_s: float
    change: Change | None = None
    tried: bool = True


def verdict_of(judged: Judged) -> tuple[str, ...]:
    """The sentence, and a warning for each thing to beware of."""
    parts = (_fit(judged.plan), _speed(judged), _limits(judged), *_change(judged))
    sentence = "; ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}.", *_warnings(judged.plan)


def mfu_of(plan: Plan, step_s: float, peak_flops_per_s: float) -> float:
    """Model FLOPs utilization (Chowdhery et al., PaLM, 2022): what is recomputed does not count."""
    model = sum(each.forward_flops + each.backward_flops for each in plan.stages)
    flops = plan.microbatches * plan.dp * model
    could = step_s * plan.n_stages * plan.dp * peak_flops_per_s
    return flops / could if could else 0.0


def _fit(plan: Plan) -> str:
    fullest = plan.fullest
    peak, budget = fullest.memory.needed, plan.limit_of(fullest)
    where = f"rank {fullest.rank}" if plan.virtual_stages > 1 else f"stage {fullest.stage}"
    if budget is None:
        return f"needs {bytes_text(peak)} at most, on {where} (no limit was given)"
    if peak > budget:
        return f"does not fit: {where} takes {bytes_text(peak)} of {bytes_text(budget)}"
    return (
        f"fits, with {bytes_text(budget - peak)} to spare on {where}, the fullest, "
        f"of {bytes_text(budget)}"
    )


def _speed(judged: Judged) -> str:
    plan, real = judged.plan, judged.real
    tokens = plan.microbatch_tokens or plan.microbatch_rows
    amount = plan.microbatches * plan.dp * tokens
    what = "tokens/s" if plan.microbatch_tokens else "rows/s"
    how = "measured" if real.costs == "profile" else "calibrated"
    rates = [rate_text(amount / s) if s else "–" for s in (real.step_s, judged.bound_s)]
    mfu = mfu_of(real, real.step_s, judged.peak_flops_per_s)
    what += "" if plan.training else " of forwards alone"
    return f"{rates[0]} {what} {how} ({rates[1]} is the bound), MFU {mfu:.1%}"


def _limits(judged: Judged) -> str:
    first, *others = limits_of(judged.real, judged.timeline)
    whole = "step" if judged.plan.training else "forward"
    said = f"limited by {first.name} ({first.share:.0%} of the {whole})"
    more = [f"{each.name} ({each.share:.0%})" for each in others if each.share >= NOTABLE]
    return f"{said}, then by {' and '.join(more)}" if more else said


def _change(judged: Judged) -> Iterator[str]:
    change = judged.change
    if change is None:
        if judged.tried:
            yield "no single change that was tried would help much"
        return
    saved = 1 - change.step_s / change.instead_of_s
    rates = " at peak rates" if judged.plan.costs == "roofline" else ""
    yield (
        f"most would help {change.flags}: {seconds_text(change.step_s)} instead of "
        f"{seconds_text(change.instead_of_s)} per {'step' if judged.plan.training else 'batch'}"
        f"{rates}, {saved:.0%} less"
    )


def _warnings(plan: Plan) -> Iterator[str]:
    fullest = plan.fullest
    peak, budget = fullest.memory.needed, plan.limit_of(fullest)
    if budget is None or not FULL * budget < peak <= budget:
        return
    yield (
        f"warning: {peak / budget:.0%} of the memory is planned for, and {_more(fullest)} "
        f"come on top: --memory {_careful(budget)} plans for 90% of it"
    )


def _more(stage: StagePlan) -> str:
    """What is taken and not planned for."""
    if stage.memory.device:
        return "the allocator's gaps"
    return "workspaces of kernels, the allocator's gaps and buffers of links"


def _careful(budget: int) -> str:
    """90 % of it, as --memory takes it."""
    return bytes_text(FULL * budget).replace(" ", "").replace(",", "")

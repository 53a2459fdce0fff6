"""What a small change of the options would bring, worked out for this plan.

Every number comes from running the plan's own schedule again under the change, or from solving
its partitioning problem again. Nothing is said where the change would bring little.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ...passes.generators.shape import PipelineShape
from ...passes.partition.solve import solve
from ...passes.schedule.communication import add_communication
from ...passes.schedule.forward_only import forward_only
from ...passes.schedule.from_file import kind_of
from ...passes.schedule.registry import DEFAULT, ScheduleKind
from ...passes.schedule.simulate import Timeline, simulate
from ..costs.hardware import Device
from ..ir.actions import Kind, Schedule
from ..ir.errors import PartitionError
from ..ir.graph import Phase
from ..ir.problem import Problem, Solution
from ..ir.program import Message
from ..plan.plan import Plan, TiedPlan
from ..planning.formulation import elsewhere
from .compare import solution_in, unit_names
from .quantities import bytes_scale, bytes_text, seconds_text

WIDE_BUBBLE = 0.25
NOTABLE = 0.05  # of a step, or of what is sent: smaller changes are not worth a line
SMALL = 0.005  # of a step: not seen in three digits
PRICE_MARGIN = 1.03
ROOMY = 0.6  # of the budget
UNEVEN = 1.1  # slowest stage to mean
MOST_GROWTH = 8  # times as many microbatches
SOLVE_S = 3.0


@dataclass(frozen=True)
class Subject:
    """What hints are about.

    Attributes:
        problem: that the plan solves; None for a plan that was given.
        remat: the option.
    """

    plan: Plan
    timeline: Timeline
    device: Device
    problem: Problem | None = None
    remat: str = "auto"

    @property
    def schedule(self) -> ScheduleKind:
        return kind_of(self.plan.options.get("schedule", DEFAULT))

    def shape(self, microbatches: int) -> PipelineShape:
        """The plan's pipeline, with so many microbatches."""
        plan = self.plan
        actions = (interval.action for row in self.timeline.ranks for interval in row)
        split = {action.stage for action in actions if action.kind is Kind.W}
        splits = [stage.stage in split for stage in plan.stages]
        return self.schedule.shape(plan.n_stages, microbatches, plan.virtual_stages, splits)


def hints(subject: Subject) -> Iterator[str]:
    """The changes worth a try, one line each."""
    for rule in (
        _microbatches,
        _tied_gradients,
        _transfers,
        _large_unit,
        _pins,
        _recomputation,
        _room,
    ):
        line = rule(subject)
        if line:
            yield line


def resimulated(
    subject: Subject,
    *,
    microbatches: int | None = None,
    link_speed: float = 1.0,
    spared_bytes: Mapping[tuple[int, int], int] | None = None,
) -> Timeline:
    """The plan's schedule, run again.

    Args:
        microbatches: of the same size, so many.
        link_speed: 2 for links that carry twice as much; infinity for free transfers.
        spared_bytes: (from, to) -> bytes that need not be sent.
    """
    plan, device = subject.plan, subject.device
    spared = spared_bytes or {}
    m = microbatches or plan.microbatches
    home = [stage.rank for stage in plan.stages]
    transfer_s = {
        (stage.stage, t.dst): device.message_s(
            home[stage.stage], home[t.dst], t.bytes - spared.get((stage.stage, t.dst), 0)
        )
        / link_speed
        for stage in plan.stages
        for t in stage.sends
    }
    compute_s = {
        (interval.action.stage, interval.action.kind): interval.end_s - interval.start_s
        for row in subject.timeline.ranks
        for interval in row
    }
    closing_s, send_s = subject.timeline.closing_s, device.send_s(transfer_s, home)
    return simulate(_schedule(subject, m), compute_s, transfer_s, closing_s, send_s=send_s)


def _schedule(subject: Subject, microbatches: int) -> Schedule:
    """The plan's kind of schedule."""
    shape = subject.shape(microbatches)
    compute = subject.schedule.order(shape) if subject.plan.training else forward_only(shape)
    sends = ((stage.stage, t) for stage in subject.plan.stages for t in stage.sends)
    messages = [Message(src, t.dst, Phase(t.phase), ()) for src, t in sends]
    return add_communication(compute, messages)


# -- the schedule -------------------------------------------------------------------------------


def _microbatches(subject: Subject) -> str | None:
    """More microbatches of the same size: a smaller bubble, and the closing shared by more."""
    plan, now = subject.plan, subject.timeline
    if max(plan.bubble, _closing(now)) <= WIDE_BUBBLE or subject.schedule.fixed:
        return None
    growth, then = 1, now
    while growth < MOST_GROWTH and _fits(subject, 2 * growth * plan.microbatches):
        more = resimulated(subject, microbatches=2 * growth * plan.microbatches)
        if 2 * then.step_s < (1 + NOTABLE) * more.step_s:
            break
        growth, then = 2 * growth, more
        if max(then.bubble, _closing(then)) <= WIDE_BUBBLE:
            break
    if growth == 1:
        return None
    rows = plan.microbatches * plan.microbatch_rows * plan.dp
    why = (
        f"the bubble would be {then.bubble:.1%} instead of {plan.bubble:.1%}"
        if plan.bubble >= _closing(now)
        else "gradient exchange and optimizer would take "
        f"{_closing(then):.1%} of the step instead of {_closing(now):.1%}"
    )
    return (
        f"--microbatches {growth * plan.microbatches} of the same size (a batch of "
        f"{growth * rows:,} rows instead of {rows:,}): {why}, "
        f"{growth * now.step_s / then.step_s:.2f} × the rows per second"
    )


def _closing(timeline: Timeline) -> float:
    """The share of a step that follows its last microbatch."""
    return max(timeline.closing_s, default=0.0) / timeline.step_s if timeline.step_s else 0.0


def _fits(subject: Subject, microbatches: int) -> bool:
    """Whether so many microbatches would fit into memory."""
    plan = subject.plan
    if plan.budget_bytes is None:
        return True
    more = microbatches / plan.microbatches - 1
    longest = subject.schedule.in_flight(subject.shape(microbatches))
    for stages in plan.ranks:
        memory, limit = stages[0].memory, plan.limit_of(stages[0])
        extra = sum(max(0, longest[s.stage] - s.in_flight) * s.stash_bytes for s in stages)
        if limit is not None and memory.needed + extra + more * memory.batch > limit:
            return False
    return True


def _tied_gradients(subject: Subject) -> str | None:
    """A tied weight's gradient may travel once per step."""
    plan = subject.plan
    m = plan.microbatches
    total = m * sum(t.bytes for stage in plan.stages for t in stage.sends)
    for tied in plan.tied:
        parts = (len(_ranks_of(plan, tied)) - 1) * tied.part_bytes
        if tied.summed != "per_microbatch" or not total or m * parts <= NOTABLE * total:
            continue
        line = (
            f"--tied-grads per_step: the gradient of {tied.name} is {m * parts / total:.0%} of "
            f"all that is sent, {bytes_text(m * parts)} per step, and would be "
            f"{bytes_text((len(_ranks_of(plan, tied)) - 1) * tied.bytes)}; no longer bit-exact"
        )
        if len(tied.stages) == 2:
            low, high = sorted(tied.stages)
            then = resimulated(subject, spared_bytes={(high, low): tied.part_bytes})
            line += (
                f"; the step would take {seconds_text(then.step_s)} {_instead(plan)}"
                if then.step_s < (1 - SMALL) * plan.step_s
                else "; the step is no shorter, as computation hides what is sent"
            )
        return line
    return None


def _transfers(subject: Subject) -> str | None:
    """Transfers that no computation hides."""
    now = subject.timeline
    free = resimulated(subject, link_speed=math.inf)
    hidden = 1 - free.step_s / now.step_s if now.step_s else 0.0
    if hidden <= NOTABLE:
        return None
    fast = resimulated(subject, link_speed=2)
    stage, most = max(
        ((s, t) for s in subject.plan.stages for t in s.sends), key=lambda pair: pair[1].bytes
    )
    return (
        f"transfers that nothing hides take {hidden:.0%} of the step; the largest are "
        f"{bytes_text(most.bytes)} per microbatch from stage {stage.stage} to {most.dst}. Half "
        f"the bytes, or a link twice as fast: {seconds_text(fast.step_s)} {_instead(subject.plan)}"
    )


def _ranks_of(plan: Plan, tied: TiedPlan) -> set[int]:
    return {plan.stages[stage].rank for stage in tied.stages}


# -- the stages ---------------------------------------------------------------------------------


def _large_unit(subject: Subject) -> str | None:
    """A unit that is nearly a stage by itself: a head over a large vocabulary, say."""
    plan = subject.plan
    seconds = [math.fsum(each) for each in plan.decision.unit_seconds]
    if len(plan.stages) == 1 or not seconds:
        return None
    stages = [math.fsum(t for t, s in _with_stage(plan, seconds) if s == i) for i in _all(plan)]
    mean = math.fsum(stages) / len(stages)
    largest = max(range(len(seconds)), key=seconds.__getitem__)
    where = plan.decision.unit_stage[largest]
    slowest = stages[where] == max(stages)
    if not slowest or max(stages) <= UNEVEN * mean or seconds[largest] <= stages[where] / 2:
        return None
    name = _unit_name(subject, largest)
    line = (
        f"stage {where} is the slowest because of one unit, {name}: "
        f"{seconds_text(seconds[largest])} of its {seconds_text(stages[where])}, the mean stage "
        f"has {seconds_text(mean)}"
    )
    balanced = int(math.fsum(seconds) / seconds[largest])
    if 1 <= balanced < len(plan.stages):
        line += (
            f". A unit is not divided: {len(plan.stages)} stages cannot be even, {balanced} could"
        )
    return line


def _unit_name(subject: Subject, unit: int) -> str:
    """The modules of a unit, without those that only stand around others."""
    if subject.problem is None:
        return f"number {unit} of {len(subject.plan.decision.unit_nodes)}"
    return unit_names(subject.problem)[unit]


def _pins(subject: Subject) -> str | None:
    """What pinned modules cost."""
    if subject.problem is None or not subject.problem.pins:
        return None
    own = solution_in(subject.problem, subject.plan.decision)
    free = _solved(replace(subject.problem, pins={}))
    if free is None or free.objective >= own.objective * (1 - NOTABLE):
        return None
    return (
        f"without --pin the step would take {1 - free.objective / own.objective:.0%} less "
        f"({seconds_text(free.objective)} instead of {seconds_text(own.objective)} by the "
        "problem's prices)"
    )


# -- memory -------------------------------------------------------------------------------------


def _recomputation(subject: Subject) -> str | None:
    """What recomputation costs, and how much memory would spare it."""
    plan, problem = subject.plan, subject.problem
    again = math.fsum(stage.recompute_s for stage in plan.stages)
    whole = math.fsum(stage.forward_s + stage.backward_s for stage in plan.stages) + again
    if again <= NOTABLE * whole:
        return None
    share = f"recomputation is {again / whole:.0%} of all computing"
    used = _used(plan)
    if subject.remat == "full":
        if plan.budget_bytes is None:
            return f"{share}: without a --memory limit, --remat auto recomputes nothing"
        if used <= ROOMY:
            return (
                f"{share}, while the fullest stage uses {used:.0%} of the "
                "budget: --remat auto recomputes only what does not fit"
            )
        return None
    if problem is None:
        return None
    own = solution_in(problem, plan.decision)
    # what programs spare where they recompute says nothing about others
    reserves = tuple(max(0.0, reserve) for reserve in problem.reserve_bytes)
    unlimited = (math.inf,) * problem.n_ranks
    free = _solved(replace(problem, budget_bytes=unlimited, reserve_bytes=reserves))
    if free is None or free.objective >= own.objective * (1 - NOTABLE):
        return None
    # prices may be off by a little where the programs are other ones
    enough = _rounded_up(PRICE_MARGIN * max(free.ranks_bytes))
    return (
        f"{share}: with --memory {enough} there would be none, and "
        f"the step would take {1 - free.objective / own.objective:.0%} less (problem's prices)"
    )


def _rounded_up(number: float) -> str:
    """Bytes as --memory takes them."""
    scale = bytes_scale([number])
    steps = 10**scale.digits
    return f"{math.ceil(number / scale.size * steps) / steps}{scale.unit}"


def _room(subject: Subject) -> str | None:
    """A budget that is hardly used may hold fewer stages, and more replicas beside them."""
    plan, problem = subject.plan, subject.problem
    if problem is None or plan.budget_bytes is None or problem.pins or plan.n_stages == 1:
        return None
    if subject.schedule.fixed or len(set(problem.kinds)) > 1:
        return None
    used = _used(plan)
    if used > ROOMY:
        return None
    own = solution_in(problem, plan.decision)
    for n in (n for n in range(1, plan.n_stages) if plan.n_stages % n == 0):
        changed = _on_fewer(subject, problem, n)
        found = None if changed is None else _solved(changed)
        if found is None or found.objective >= own.objective * (1 - NOTABLE):
            continue
        ranks = plan.n_stages * plan.dp
        before = ", before the exchange of gradients" if plan.training else ""
        return (
            f"the fullest stage uses {used:.0%} of the budget: {n} × dp {ranks // n} on the same "
            f"{ranks} ranks would fit ({bytes_text(max(found.ranks_bytes))}) and take "
            f"{seconds_text(found.objective)} instead of {seconds_text(own.objective)} by the "
            f"problem's prices{before}; --stages auto --devices {ranks} "
            "weighs it"
        )
    return None


def _on_fewer(subject: Subject, problem: Problem, n: int) -> Problem | None:
    """The same batch on fewer ranks and as many times more replicas; microbatches stay alike."""
    plan = subject.plan
    share, rest = divmod(plan.microbatches * n, problem.n_ranks)
    if rest or not share:
        return None
    return elsewhere(problem, subject.schedule, n, share, plan.virtual_stages)


# -- helpers ------------------------------------------------------------------------------------


def _used(plan: Plan) -> float:
    """The share of its memory that the fullest rank uses; 0 without limits."""
    limits = [(each.memory.needed, plan.limit_of(each)) for each in plan.stages]
    return max(needed / limit if limit else 0.0 for needed, limit in limits)


def _solved(problem: Problem) -> Solution | None:
    with contextlib.suppress(PartitionError):
        return solve(problem, time_limit_s=SOLVE_S, solver="dynamic")
    return None


def _instead(plan: Plan) -> str:
    return f"instead of {seconds_text(plan.step_s)}"


def _with_stage(plan: Plan, seconds: list[float]) -> Iterator[tuple[float, int]]:
    return zip(seconds, plan.decision.unit_stage, strict=True)


def _all(plan: Plan) -> range:
    return range(len(plan.stages))

"""How a plan stands against what people do by hand, all at the same prices.

The prices are those of the partitioning problem (`compiler.ir.problem`): seconds of a step are
m of the slowest rank and what the schedule waits, with every transfer counted in full and without
the optimizer; for 1F1B (m − 1) · max T_s + Σ T_s. Bytes are
those of the units, and what programs turned out to need beyond them: in the plan's own row its own
(`calibrated`), in the others the most that those of any division did which the solver led to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...passes.partition import baselines
from ...passes.partition.sharing import apart
from ..ir.errors import OptionError, PartitionError
from ..ir.problem import Problem, Solution, fits, solution_of
from ..plan.decision import Decision
from ..plan.plan import Plan

STRATEGIES: Mapping[str, Callable[[Problem], Solution]] = {
    "uniform": baselines.solve_uniform,
    "parameters": baselines.solve_parameters,
    "sequential": baselines.solve_sequential,
    "all-or-nothing": baselines.solve_all_or_nothing,
    "dynamic": baselines.solve_dynamic,
}
QUICK = ("uniform", "parameters", "sequential")
"""Those that take no time."""


@dataclass(frozen=True)
class Comparison:
    """One strategy at the problem's prices.

    Attributes:
        units: per stage.
        bottleneck_s: of the slowest rank, per microbatch.
        step_s: of all microbatches.
        ratio: ``step_s`` to the plan's own.
        peak_bytes, peak_rank: of the fullest rank.
        over_bytes: how much the worst rank is above its budget; 0 where all fit.
        reason: why there is no such division; the numbers are 0 then.
    """

    name: str
    units: tuple[int, ...] = ()
    bottleneck_s: float = 0.0
    step_s: float = 0.0
    ratio: float = 0.0
    peak_bytes: float = 0.0
    peak_rank: int = 0
    over_bytes: float = 0.0
    reason: str = ""

    @property
    def fits(self) -> bool:
        return not self.reason and not self.over_bytes


ORDERS = "schedules"
"""Not a strategy of dividing a model: every schedule, each with a division of its own."""


def check_names(names: Sequence[str]) -> None:
    """Raises OptionError for a strategy that does not exist, or stands twice."""
    for i, name in enumerate(names):
        if name not in (*STRATEGIES, ORDERS):
            raise OptionError(f"--compare {name!r}: known are {', '.join((*STRATEGIES, ORDERS))}")
        if name in names[:i]:
            raise OptionError(f"--compare names {name} twice")


def compare(
    problem: Problem, decision: Decision, names: Sequence[str], asked: Problem | None = None
) -> tuple[Comparison, ...]:
    """The plan's own row, and one per strategy.

    Args:
        problem: with the reserves of the plan's programs.
        asked: the same with those of any that were tried; where not given, ``problem``.
    """
    own = solution_in(problem, decision)
    rows = [_row("this plan", problem, own, own.objective)]
    asked = asked or problem
    for name in names:
        try:
            found = STRATEGIES[name](apart(asked))
            found = solution_of(asked, found.stage, found.option, found.solver)
        except PartitionError as error:
            rows.append(Comparison(name, reason=" ".join(str(error).split())))
        else:
            rows.append(_row(name, asked, found, own.objective))
    return tuple(rows)


def calibrated(problem: Problem, plan: Plan) -> Problem:
    """The problem with reserves that make its bytes of the plan those of the plan's programs."""
    own = solution_in(problem, plan.decision).ranks_bytes
    rows = zip(plan.ranks, problem.reserve_bytes, own, strict=True)
    reserve = tuple(stages[0].memory.needed - (priced - held) for stages, held, priced in rows)
    return replace(problem, reserve_bytes=reserve)


def solution_in(problem: Problem, decision: Decision) -> Solution:
    """A decision as a solution of the problem that it came from.

    A decision says what a unit's option takes, which tells the unit's options apart.
    """
    option = []
    rows = zip(problem.options, decision.unit_seconds, decision.unit_stage, strict=True)
    for menu, seconds, stage in rows:
        off = [abs(each.on(problem.kind_of(stage)) - sum(seconds)) for each in menu]
        option.append(off.index(min(off)))
    return solution_of(problem, decision.unit_stage, option, decision.search.solver)


def _row(name: str, problem: Problem, found: Solution, own_s: float) -> Comparison:
    over = max(b - limit for b, limit in zip(found.ranks_bytes, problem.budget_bytes, strict=True))
    fullest = max(range(problem.n_ranks), key=found.ranks_bytes.__getitem__)
    return Comparison(
        name,
        tuple(found.stage.count(s) for s in range(problem.n_stages)),
        max(problem.ranks_s(found.stages_s)),
        found.objective,
        found.objective / own_s if own_s else 1.0,
        found.ranks_bytes[fullest],
        fullest,
        0.0 if fits(problem, found) else over,
    )


def unit_names(problem: Problem | None) -> tuple[str, ...]:
    """Per unit, its modules without those that only stand around others."""
    if problem is None:
        return ()
    found = []
    for unit in range(problem.n_units):
        names = problem.label(unit).split(", ")
        inner = [n for n in names if n and not any(o.startswith(f"{n}.") for o in names)]
        found.append(", ".join(inner[:3]) + (", ..." if len(inner) > 3 else ""))
    return tuple(name or "the model's own operators" for name in found)

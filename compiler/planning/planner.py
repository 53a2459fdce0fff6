"""Chooses stages and recomputation for the first graph of a model.

The solver works on units and their prices (`compiler.ir.problem`); the programs that follow from
its answer are then walked operator by operator (`compiler.memory.rank_memory`). Where the two
differ, the difference is given to the solver as a reserve, and it is asked again: at most
`ATTEMPTS` times.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

from torch import fx

from ...passes.integer.work import Work
from ...passes.partition.baselines import solve_dynamic
from ...passes.partition.sharing import apart
from ...passes.partition.solve import solve
from ...passes.schedule.load import Load
from ..costs.hardware import Device
from ..ir.errors import MemoryBudgetError, PartitionError
from ..ir.graph import JointGraph, is_latest
from ..ir.locality import Locality
from ..ir.problem import Problem, Solution, fits, solution_of
from ..memory.rank_memory import RankMemory
from ..options.options import CompileOptions
from ..plan.decision import Decision
from ..units.pricing import UnitPrices
from ..units.weights import weight_works
from . import decide
from .advice import advice, gib, parts_of
from .formulation import Terms, formulate
from .parts import Parts
from .refine import LEAST_GAIN, StepModel, refine, smoothed

ATTEMPTS = 6
ROUGH_ATTEMPTS = 3
HOPELESS = 1.25  # of the budget: what programs need so far above it is not found to fit later
UNREAD = "planned roughly, without a look for what helps"
QUICK_S = 5.0  # time limit of an attempt; the last one gets what the options say
SHARED = 1 / 6  # of the time limit, where ranks hold several stages: the slowest is not all
CLOSE = 0.02  # of the budget: with prices this near to the truth only a shorter step is worth more
POLISHES = 3  # local searches, each knowing better what its moves take
HIDDEN = "as if links were hidden, as computation hides most of what they carry"
EVEN = "with even stages, as ranks of uneven ones would wait longer"
ROOMY = 0.8  # of the budget: stages below it were not shaped by it

Draft = Callable[[Decision], Sequence[RankMemory]]
"""Memory of each rank with the programs that would follow."""


@dataclass(frozen=True)
class Drafted:
    """A decision, and what its programs really need.

    Attributes:
        memory: per rank.
    """

    problem: Problem
    solution: Solution
    decision: Decision
    memory: tuple[RankMemory, ...]

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """Per rank, of its budget."""
        return tuple(rank.needed_bytes for rank in self.memory)

    @property
    def excess_bytes(self) -> list[float]:
        """Per rank, what it needs beyond its price."""
        pairs = zip(self.peak_bytes, self.solution.ranks_bytes, strict=True)
        return [real - priced for real, priced in pairs]

    @property
    def over_bytes(self) -> tuple[float, ...]:
        """Per rank, what it needs above its budget; negative where there is room."""
        pairs = zip(self.peak_bytes, self.problem.budget_bytes, strict=True)
        return tuple(peak - budget for peak, budget in pairs)

    @property
    def fits(self) -> bool:
        return max(self.over_bytes) <= 0


class Reserves:
    """What to add to the prices of each rank so that they are those of its programs.

    The difference depends on the division. Until one fits, a rank is asked for the most that any
    division has needed there. Then less is tried, to let better ones in: where that brings back
    one that does not fit, the next reserve lies halfway between the largest that was too small
    and the smallest that was enough.
    """

    def __init__(self, n_ranks: int):
        self.small = [-math.inf] * n_ranks
        self.enough = [math.inf] * n_ranks
        self.most = [-math.inf] * n_ranks

    def next(self, tried: Sequence[float], drafted: Drafted) -> tuple[float, ...]:
        """The reserves after those that led to a draft."""
        wanted = [r + e for r, e in zip(tried, drafted.excess_bytes, strict=True)]
        again = not any(map(math.isinf, self.most))
        self.most = [max(pair) for pair in zip(self.most, wanted, strict=True)]
        for rank, (reserve, over) in enumerate(zip(tried, drafted.over_bytes, strict=True)):
            if over > 0:
                self.small[rank] = max(self.small[rank], reserve)
            elif drafted.fits:
                self.enough[rank] = min(self.enough[rank], reserve)
        if any(map(math.isinf, self.enough)):
            return tuple(self.most) if again else tuple(wanted)
        return tuple(map(self._between, range(len(tried)), wanted))

    def _between(self, rank: int, wanted: float) -> float:
        if self.small[rank] < wanted < self.enough[rank] or math.isinf(self.small[rank]):
            return wanted
        return (self.small[rank] + self.enough[rank]) / 2


class Planner:
    """One graph's decision.

    Attributes:
        solved: the problem whose solution was taken; None before.
        asked: the same, with the most that programs of any division which the solver led to need
            beyond their prices.

    Args:
        held_bytes: parameter FQN -> weight, gradient and optimizer states.
        rows: of a microbatch.
        budget_bytes: memory of a rank, or of each; infinity for no limit.
        pinned: forward nodes whose stage is given.
        parts: of the graph, where they are known.
        load: of the schedule; None for what its kind asks of so many microbatches.
        measured: the prices on each kind of device that ranks have, where there are several and
            they were measured.
        stepping_bytes: that the optimizer of a replica moves, of all parameters.
    """

    def __init__(
        self,
        graph: JointGraph,
        locality: Locality,
        options: CompileOptions,
        device: Device,
        held_bytes: Mapping[str, int],
        microbatches: int,
        rows: int,
        budget_bytes: float | Sequence[float],
        pinned: Mapping[fx.Node, int],
        parts: Parts | None = None,
        load: Load | None = None,
        measured: Mapping[str, Sequence[UnitPrices]] = MappingProxyType({}),
        stepping_bytes: float = 0.0,
    ):
        self._measured, self._stepping_bytes = measured, stepping_bytes
        self.graph, self.locality, self.options, self.device = graph, locality, options, device
        counts = graph.trains or not options.training
        if not isinstance(budget_bytes, Sequence):
            budget_bytes = (budget_bytes,) * options.n_stages
        self.budgets = tuple(budget_bytes) if counts else (math.inf,) * options.n_stages
        self.rows = rows
        self.solved: Problem | None = None
        self.asked: Problem | None = None
        self.parts = parts = parts or Parts.of(
            graph, locality, device, options.remat, pinned, options.fuses
        )
        self.units, self.bodies, self.grounds = parts.units, parts.bodies, parts.grounds
        self.places, self.menus = parts.places, parts.menus
        self.terms = Terms(
            options.shape(microbatches).homes,
            microbatches,
            held_bytes,
            load or options.load(microbatches),
            self.budgets,
            pins={u.index: pinned[u.nodes[0]] for u in self.units if u.nodes[0] in pinned},
            tied_per_step=options.tied_grads == "per_step",
            boundary=options.boundary,
        )

    @cached_property
    def fingerprint(self) -> str:
        return self.graph.fingerprint()

    def decide(self, draft: Draft, prices: Sequence[UnitPrices], roughly: bool = False) -> Decision:
        """The decision with the smallest predicted step that fits into memory.

        Args:
            roughly: steps are not simulated to find a better one near it, and what does not fit
                soon is refused.

        Raises:
            MemoryBudgetError: none does.
            PartitionError: too few units for the stages, or pins that contradict the order.
        """
        problem = self.problem(prices)
        if all(map(math.isinf, self.budgets)):
            self.solved = self.asked = problem
            found = self._solution(problem, self.options.time_limit_s)
            found = found if roughly else self._refined(problem, prices, found)
            return self._decision(prices, found)
        reserves = Reserves(self.options.n_stages)
        best: Drafted | None = None
        solution = self._nearest(problem, QUICK_S)
        for _ in range(ROUGH_ATTEMPTS if roughly else ATTEMPTS):
            drafted = self._drafted(problem, prices, draft, solution)
            best = self._better(best, drafted)
            tried = problem.reserve_bytes
            problem = replace(problem, reserve_bytes=reserves.next(tried, drafted))
            if problem.reserve_bytes == tried:
                break
            settled = best is not None and self._settled(drafted)
            if settled and (problem.shares_ranks or self._roomy(drafted)):
                break
            solution = self._nearest(problem, QUICK_S)
            if roughly and best is None and self._hopeless(drafted, solution):
                break
            if best is not None and settled and not _promises(solution, best.solution):
                break
        if not roughly and (best is None or not best.solution.proven):
            last = problem if best is None else best.problem
            solution = self._nearest(last, self.options.time_limit_s)
            drafted = self._drafted(last, prices, draft, solution)
            best = self._better(best, drafted)
        if best is None:
            raise self._too_small(drafted, roughly)
        self.solved = best.problem
        self.asked = replace(best.problem, reserve_bytes=tuple(reserves.most))
        return best.decision if roughly else self._polished(best, prices, draft).decision

    def _polished(self, best: Drafted, prices: Sequence[UnitPrices], draft: Draft) -> Drafted:
        """The best, or one near it whose simulated step is shorter, in all the memory there is.

        Near it its own programs tell better than prices what is left.
        """
        reserves = [
            r + e for r, e in zip(best.problem.reserve_bytes, best.excess_bytes, strict=True)
        ]
        for _ in range(POLISHES):
            problem = replace(best.problem, reserve_bytes=tuple(reserves))
            refined = self._refined(problem, prices, best.solution)
            if refined is best.solution:
                break
            refined = replace(refined, bound=min(refined.bound, refined.objective))
            drafted = self._drafted(problem, prices, draft, refined)
            if drafted.fits:
                return drafted
            reserves = [
                r + max(0.0, e) for r, e in zip(reserves, drafted.excess_bytes, strict=True)
            ]
        return best

    def _refined(
        self, problem: Problem, prices: Sequence[UnitPrices], solution: Solution
    ) -> Solution:
        """The solution, or one near it whose step is shorter when it is simulated."""
        if self.options.stage_count == 1 or not self.graph.trains:
            return solution
        model = self.step_model(problem, prices)
        solution = self._evener(problem, model, solution)
        if not problem.alike:
            solution = self.as_if_hidden(problem, model, solution)
        refined, saved = refine(model, solution)
        if not saved:
            return solution
        note = f"a local search on the simulated step then saved {saved:.1%}"
        return replace(refined, note=", ".join(filter(None, (solution.note, note))))

    def step_model(self, problem: Problem, prices: Sequence[UnitPrices]) -> StepModel:
        """Steps of the problem's solutions, simulated."""
        shape = self.options.shape(self.terms.microbatches)
        return StepModel(
            problem,
            self.options.kind,
            replace(shape, splits=(False, *shape.splits[1:])),  # it sends no gradients
            prices,
            weight_works(self.bodies, self.places, self.device),
            self.device,
            self._stepping_bytes,
            tuple(self.by_kind.values()),
        )

    @cached_property
    def by_kind(self) -> Mapping[str, Sequence[UnitPrices]]:
        """The prices on each kind of device, measured or at its rates; empty where there is one."""
        if len(set(self.device.order)) < 2:
            return {}
        return self._measured or self.parts.by_kind(self.device)

    def _better(self, best: Drafted | None, drafted: Drafted) -> Drafted | None:
        """The better one of those that fit; of equals the newer, of which more is known."""
        if not drafted.fits:
            return best
        if best is not None and best.solution.objective < drafted.solution.objective:
            return best
        return drafted

    def problem(self, prices: Sequence[UnitPrices]) -> Problem:
        """The partitioning problem at these prices."""
        by_kind = {name: _seconds(there) for name, there in self.by_kind.items()}
        return formulate(self.grounds, _seconds(prices), self.device, self.terms, by_kind)

    def _evener(self, problem: Problem, model: StepModel, solution: Solution) -> Solution:
        """The solution, or the best with even stages where that is better when it is simulated.

        Ranks that are as slow as each other may hold stages that are not, for which others wait.
        """
        if not problem.shares_ranks:
            return self._smoother(problem, model, solution)
        with contextlib.suppress(PartitionError):
            even = solve_dynamic(apart(problem), work=Work(QUICK_S))
            found = solution_of(problem, even.stage, even.option, solution.solver)
            found = smoothed(problem, found)
            steps_s = [model.searched_s(x.stage, x.option) for x in (found, solution)]
            if steps_s[0] < steps_s[1] and fits(problem, found):
                bound = min(solution.bound, found.objective)
                return replace(found, bound=bound, seconds=solution.seconds, note=EVEN)
        return solution

    def _smoother(self, problem: Problem, model: StepModel, solution: Solution) -> Solution:
        """The solution, or one as good whose other stages are alike, if its step is shorter."""
        found = smoothed(problem, solution)
        if found.stage == solution.stage or found.objective > solution.objective * (1 + LEAST_GAIN):
            return solution
        steps_s = [model.searched_s(x.stage, x.option) for x in (found, solution)]
        return found if steps_s[0] < steps_s[1] * (1 - LEAST_GAIN) else solution

    @staticmethod
    def as_if_hidden(problem: Problem, model: StepModel, solution: Solution) -> Solution:
        """The solution, or the best one where nothing waits for links, if its step is shorter: slow
        links count in full in the problem, and computation may hide what they carry."""
        free = replace(problem, values=(), links=())
        with contextlib.suppress(PartitionError):
            found = solve_dynamic(apart(free), work=Work(QUICK_S))
            other = solution_of(problem, found.stage, found.option, solution.solver)
            steps_s = [model.step_s(x.stage, x.option) for x in (other, solution)]
            if steps_s[0] < steps_s[1] * (1 - LEAST_GAIN) and fits(problem, other):
                bound = min(solution.bound, other.objective)
                return replace(other, bound=bound, seconds=solution.seconds, note=HIDDEN)
        return solution

    def _nearest(self, problem: Problem, limit_s: float) -> Solution:
        """The solution, or where none fits by the prices the nearest: its programs may still."""
        try:
            return self._solution(problem, limit_s)
        except MemoryBudgetError as error:
            nearest: Solution = error.nearest
            return nearest

    def _drafted(
        self, problem: Problem, prices: Sequence[UnitPrices], draft: Draft, solution: Solution
    ) -> Drafted:
        decision = self._decision(prices, solution)
        return Drafted(problem, solution, decision, tuple(draft(decision)))

    def _solution(self, problem: Problem, limit_s: float) -> Solution:
        options = self.options
        limit_s = min(limit_s, options.time_limit_s)
        if problem.shares_ranks:
            limit_s = min(limit_s, SHARED * options.time_limit_s)
        try:
            return solve(problem, time_limit_s=limit_s, solver=options.solver)
        except MemoryBudgetError:
            raise
        except PartitionError as error:
            names = ", ".join(sorted(n.meta["latest"] for n in self.places if is_latest(n)))
            if not names:
                raise
            raise PartitionError(
                f"{error}. What a forward does between reading a buffer and updating it is on one "
                f"stage, as the next microbatch reads it then: {names}"
            ) from error

    def _decision(self, prices: Sequence[UnitPrices], solution: Solution) -> Decision:
        order = self.device.order
        if self.by_kind:
            homes = self.terms.homes
            prices = [self.by_kind[order[homes[s]]][u] for u, s in enumerate(solution.stage)]
        made = decide.decision_of(self.fingerprint, self.units, self.menus, prices, solution)
        return replace(made, devices=order)

    def _settled(self, drafted: Drafted) -> bool:
        """Whether better prices could not lead to a better decision."""
        if not drafted.fits:
            return False
        pairs = zip(drafted.excess_bytes, self.budgets, strict=True)
        close = all(-excess < CLOSE * budget for excess, budget in pairs)
        return close or self._roomy(drafted)

    def _roomy(self, drafted: Drafted) -> bool:
        """Whether memory had no part in the decision."""
        pairs = zip(drafted.solution.ranks_bytes, self.budgets, strict=True)
        roomy = all(held < ROOMY * budget for held, budget in pairs)
        return roomy and not drafted.decision.recomputed

    def _hopeless(self, drafted: Drafted, nearest: Solution) -> bool:
        """Whether programs need far more than there is, and no division fits at prices that have
        learnt from them.

        Args:
            nearest: the one that comes next.
        """
        peaks = zip(drafted.peak_bytes, self.budgets, strict=True)
        prices = zip(nearest.ranks_bytes, self.budgets, strict=True)
        far = any(peak > HOPELESS * budget for peak, budget in peaks)
        return far and any(held > budget for held, budget in prices)

    def _too_small(self, drafted: Drafted, roughly: bool) -> MemoryBudgetError:
        over = drafted.over_bytes
        worst = max(range(len(over)), key=over.__getitem__)
        problem, solution = drafted.problem, drafted.solution
        helps = [UNREAD] if roughly else advice(problem, solution, self.options, self.rows)
        stash = problem.ranks_stash(solution.stage, solution.option)[worst]
        who = "rank" if problem.shares_ranks else "stage"
        return MemoryBudgetError(
            f"{who} {worst} needs {gib(drafted.peak_bytes[worst])} of {gib(self.budgets[worst])}, "
            f"{gib(over[worst])} too much: {'; '.join(helps)} (of what it needs, "
            f"{parts_of(drafted.memory[worst], stash)})",
            tuple(max(0.0, b) for b in over),
            drafted.solution,
            False,
        )


def _seconds(prices: Sequence[UnitPrices]) -> list[list[float]]:
    """Per unit, of its ways to run."""
    return [[p.forward_s + p.backward_s + r for r in p.recompute_s] for p in prices]


def _promises(solution: Solution, best: Solution) -> bool:
    """Whether a division is worth being drafted."""
    return solution.objective < best.objective * (1 - LEAST_GAIN)

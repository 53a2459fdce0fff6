"""The first graph's decision: solved for, or taken from a plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import fx

from ...passes.graph.placement import Placement
from ..capture.batch import BatchSpec
from ..capture.skeleton import Skeleton
from ..costs.cluster import kinds_at
from ..ir.actions import Pace, Schedule, compute_only, from_text, placement_of
from ..ir.errors import MemoryBudgetError, OptionError, PlanError
from ..ir.graph import JointGraph
from ..ir.locality import Locality
from ..ir.problem import Problem
from ..ir.zero import LEVELS, Zero
from ..kept.identity import UntoldError, identity_of
from ..kept.plans import Plans
from ..memory.optimizer_cost import Factory
from ..memory.rank_memory import RankMemory
from ..options.declaration import declarations_of
from ..options.options import CompileOptions
from ..plan.decision import Decision
from ..plan.plan import Plan
from ..planning import decide
from ..planning.keeping import Division, fill
from ..planning.orders import ordered
from ..planning.parts import Parts
from ..planning.planner import Planner
from ..planning.target import Target
from ..planning.team import Team, worst
from ..profiling.optimizer_trial import Reach, Verdict, try_optimizer
from ..units.pricing import UnitPrices, measured, measured_prices, roofline
from .assembly import Assembly, assemble
from .capturing import Shared
from .closing import trial_of
from .record import PassRecord, Recorder
from .work import Settings


def tried(
    factory: Factory | None,
    skeleton: Skeleton,
    options: CompileOptions,
    device: torch.device,
    team: Team,
    shared: Shared | None,
) -> Verdict | None:
    """How an optimizer steps, where that matters: it has a part of the parameters."""
    divides = options.zero_levels != (0,)
    if factory is None or (options.n_stages == 1 and not divides):
        return None
    named = skeleton.module.named_parameters()
    trained = {name: param for name, param in named if param.requires_grad}
    if not trained:
        return None
    known = {} if shared is None else shared.verdicts
    if divides not in known:
        found = try_optimizer(factory, trained, device, divides)
        known[divides] = team.share(lambda: found)
    return known[divides]


def divisions(options: CompileOptions, verdict: Verdict | None) -> tuple[Zero, ...]:
    """What replicas may divide, to be tried in this order.

    Args:
        verdict: how the optimizer steps; None where it does not matter, or was not tried.

    Raises:
        OptionError: it would step otherwise than on one device.
    """
    by_rows = tuple(LEVELS[level].keeping(options.zero_keep) for level in options.zero_levels)
    by_matrices = tuple(replace(zero, matrices=zero.divides_states) for zero in by_rows)
    if verdict is None:
        return by_matrices if options.zero_by == "matrices" else by_rows
    if verdict.reach is Reach.MODEL:
        if options.zero == "auto" and options.n_stages == 1:
            return by_rows[:1]
        asked = [f"n_stages={options.n_stages}"] if options.n_stages > 1 else []
        asked += [f"zero={options.zero}"] if options.zero_levels != (0,) else []
        raise OptionError(
            f"{verdict.kind} does not go with {' and '.join(asked)}: {verdict.why}, and every "
            "process has an optimizer for its part of them, so that it would train otherwise than "
            "on one device. Use n_stages=1 and zero=0 with it, or an optimizer that steps every "
            "parameter alone, such as AdamW; instead of an optimizer that clips by the norm of "
            "all gradients itself, max_grad_norm="
        )
    whole = verdict.reach is Reach.TENSOR and by_rows[-1].divides_states
    if whole and options.zero_by == "rows":
        raise OptionError(
            f'zero_by="rows" steps each replica\'s rows alone, and {verdict.kind} needs whole '
            f'parameters, for {verdict.why}: use zero_by="matrices" with it, or an optimizer that '
            "treats every element alone, such as AdamW"
        )
    return by_matrices if whole or options.zero_by == "matrices" else by_rows


@dataclass(frozen=True)
class _Prices:
    """Of all units; where ranks have several kinds of devices and they are measured, on each."""

    units: Sequence[UnitPrices]
    by_kind: Mapping[str, Sequence[UnitPrices]] = field(default_factory=dict)


@dataclass(frozen=True)
class Draft:
    """What a decision was tried with.

    Attributes:
        made: its programs, with nothing searched for them.
    """

    decision: Decision
    made: Assembly
    records: Sequence[PassRecord]


@dataclass(frozen=True)
class Decided:
    """Stages and recomputation of one graph.

    Attributes:
        again: the forward nodes that the backward computes again.
        why_zero: why this level of ZeRO, where there was a choice.
        closing_s: per rank, from a plan; None where it has to be worked out.
        planned: whether it is from a plan.
        order: of the compute actions, from a plan; None where it has to be made.
        pace: of the graph that this one follows.
        problem: that this process solved, if it did.
        told: by what other runs find the plan that is made of it.
        draft: the last one that was made on the way.
    """

    settings: Settings
    decision: Decision
    placement: Placement
    again: frozenset[fx.Node]
    why_zero: str = ""
    closing_s: list[float] | None = None
    planned: bool = False
    order: Schedule | None = None
    pace: Pace | None = None
    problem: Problem | None = None
    told: tuple[object, ...] = ()
    draft: Draft | None = None

    def assembled(
        self, graph: JointGraph, locality: Locality, decision: Decision, recorder: Recorder
    ) -> Assembly:
        """All that follows: the draft, where that was of this decision and lacks nothing.

        Args:
            decision: with what is known of it by now.
        """
        settings, draft = self.settings, self.draft
        lacks = settings.schedule.searches and not settings.drafts
        if lacks or recorder.folder is not None:  # where passes write what they made
            draft = None
        if draft is not None and draft.decision is self.decision:
            recorder.records += draft.records
            return draft.made
        work = graph, locality, self.placement.stage, self.again
        return assemble(settings, *work, decision, self.order, self.pace, recorder)


@dataclass(frozen=True)
class Deciding:
    """What a decision is made from.

    Attributes:
        given: the plan that decides, if there is one.
        plans: of other runs.
        spec: of one microbatch.
        batch: its leaves, to measure with.
        shared: parts of graphs that others with the same graph know, too.
    """

    skeleton: Skeleton
    target: Target
    team: Team
    given: Plan | None
    plans: Plans
    graph: JointGraph
    locality: Locality
    spec: BatchSpec
    batch: Sequence[torch.Tensor]
    shared: Shared | None = None

    def decide(self, levels: Sequence[Zero], settings_of: Callable[[Zero], Settings]) -> Decided:
        """The decision at the lowest level of ZeRO at which there is one.

        Args:
            levels: those to try, in this order.

        Raises:
            MemoryBudgetError: none fits at the last of them.
            PlanError: the plan was made for something else.
        """
        self.team.agree(self._fingerprint)
        if self.given is not None:
            return self._from_plan(self.given, settings_of(levels[0]))
        told = self._told(settings_of(levels[0])) if len(levels) == 1 else ()
        made = self.team.share(lambda: self.plans.find(*told))
        with contextlib.suppress(PlanError):
            if made is not None:
                return self._from_plan(made, settings_of(levels[0]))
        failures: list[str] = []
        for level in levels:
            settings = settings_of(level)
            try:
                decision, problem, draft = self._planned(settings)
            except MemoryBudgetError as error:
                if level == levels[-1]:
                    raise
                failures.append(f"at {level.level} {str(error).partition(':')[0]}")
                continue
            why = "; ".join(failures) or "everything fits undivided"
            placed = decide.apply(decision, self.graph, self.locality)
            chosen = f"zero={level.level}: {why}" if len(levels) > 1 else ""
            known = settings.along(decision), decision, *placed, chosen
            return Decided(*known, problem=problem, told=told, draft=draft)
        raise AssertionError("there is a level to try")

    def _planned(self, settings: Settings) -> tuple[Decision, Problem | None, Draft | None]:
        graph, locality = self.graph, self.locality
        planner = self._planner(settings)
        prices = self._prices(planner)
        if prices.by_kind:
            planner = self._planner(settings, planner, prices.by_kind)
        made, solved = list[Draft](), list[Problem | None]()

        def drafted(decision: Decision) -> Assembly:
            placement, again = decide.apply(decision, graph, locality)
            recorder, work = Recorder(None), (graph, locality, placement.stage, again)
            drafts = replace(settings.along(decision), drafts=True)
            tried = assemble(drafts, *work, decision, None, None, recorder)
            made[:] = [Draft(decision, tried, recorder.records)]
            return tried

        def decided() -> Decision:
            decision, problem = self._ordered(settings, planner, prices.units, drafted)
            solved[:] = [problem]
            if not settings.keeps:
                return decision
            is_made = bool(made) and made[0].decision is decision
            own = settings.along(decision)
            return self._keeping(decision, own, made[0].made if is_made else drafted(decision))

        decision = self.team.share(decided)
        return decision, next(iter(solved), None), next(iter(made), None)

    def _planner(
        self,
        settings: Settings,
        like: Planner | None = None,
        measured: Mapping[str, Sequence[UnitPrices]] = MappingProxyType({}),
    ) -> Planner:
        """For the devices of the settings' ranks.

        Args:
            like: one for the same ranks on other devices.
            measured: as of `Planner`.
        """
        pinned = self._pinned(settings.options)
        parts = None if like is None else like.parts
        if parts is None and self.shared is not None and not pinned:
            parts = self._parts(settings.options)
        planner = Planner(
            self.graph,
            self.locality,
            settings.options,
            settings.rates,
            settings.footprint.held_bytes(self.graph.copies, self.graph.copied_alone),
            settings.microbatches,
            self.spec.rows,
            settings.budgets,
            pinned,
            parts,
            measured=measured,
            stepping_bytes=settings.footprint.stepping_bytes(self.graph.copies),
        )
        planner.fingerprint = self._fingerprint
        return planner

    @cached_property
    def _fingerprint(self) -> str:
        return self.graph.fingerprint()

    def _ordered(
        self,
        settings: Settings,
        planner: Planner,
        prices: Sequence[UnitPrices],
        drafted: Callable[[Decision], Assembly],
    ) -> tuple[Decision, Problem | None]:
        """The decision, with the devices of one kind or several in the best order.

        Raises:
            MemoryBudgetError: in none of the orders that were looked at it fits.
        """

        def draft(decision: Decision) -> Sequence[RankMemory]:
            return drafted(decision).memory

        cluster, roughly = settings.rates.cluster, self.target.roughly
        if cluster is None or cluster.numbering is None:
            return planner.decide(draft, prices, roughly), planner.asked

        def planner_of(order: tuple[str, ...]) -> Planner:
            rates = settings.rates.along(order)
            own = replace(settings, rates=rates)
            return self._planner(own, planner, planner.by_kind if self.target.measures else {})

        found = ordered(cluster.orders(cluster.numbering), planner_of, prices)
        refusal: MemoryBudgetError | None = None
        for number, each in enumerate(found.best):
            try:
                decision = each.planner.decide(draft, prices, roughly)
            except MemoryBudgetError as error:
                refusal = refusal or error
                continue
            taken = replace(found, best=found.best[number:])
            return replace(decision, order_note=taken.note), each.planner.asked
        assert refusal is not None
        raise refusal

    def _keeping(self, decision: Decision, settings: Settings, draft: Assembly) -> Decision:
        """With what fits beside it whole over a step, and shortens it."""
        if not self.graph.trains:
            return decision
        footprint = settings.footprint
        kept = fill(
            draft.whole,
            Division(settings.zero, settings.options.dp, settings.microbatches),
            placement_of([settings.shape.homes[s] for s in range(settings.options.stage_count)]),
            lambda name: footprint.size(name)[1],
            trial_of(draft, settings),
            settings.budgets,
        )
        return replace(decision, kept=kept)

    def _parts(self, options: CompileOptions) -> Parts:
        assert self.shared is not None
        ways = options.remat, options.fuses
        return self.shared.parts(self.graph, self.locality, self.target.spec, *ways)

    def _prices(self, planner: Planner) -> _Prices:
        bodies, menus, rates = planner.bodies, planner.menus, planner.device
        if not self.target.measures:
            return _Prices(roofline(bodies, menus))
        of = self.graph, self.locality, bodies, menus
        own = {k: measured(*of, each, self.batch) for k, each in self.target.profilers.items()}
        pooled = self.team.pool(own)
        places = {name: kinds_at(rates, rank) for rank, name in enumerate(rates.order)}
        found = {
            name: measured_prices(bodies, menus, worst(pooled, kinds))
            for name, kinds in (places or {"": kinds_at(rates, 0)}).items()
        }
        return _Prices(next(iter(found.values())), found if len(found) > 1 else {})

    def _pinned(self, options: CompileOptions) -> dict[fx.Node, int]:
        module, canonical = self.skeleton.module, self.skeleton.canonical
        names = {name for name, _ in module.named_modules()} | set(canonical)
        pin = {canonical.get(name, name): stage for name, stage in (options.pin or {}).items()}
        return decide.pinned_nodes(self.graph, self.locality, pin, names)

    def _told(self, settings: Settings) -> tuple[object, ...]:
        """All that a decision depends on; nothing where that cannot be told."""
        options, profilers = settings.options, self.target.profilers
        chosen = {
            name: repr(getattr(options, name))
            for name, option in declarations_of(type(options)).items()
            if option.plan == "decides"
        }
        try:
            optimizer = identity_of(options.optimizer)
        except UntoldError:
            return ()
        return (
            *(self._fingerprint, self.spec.described(), settings.microbatches),
            *(options.n_stages, options.virtual, options.dp, options.in_plan(), chosen, optimizer),
            options.fuses,
            self.target.budget_bytes,
            self.target.whole,
            [each.told for each in profilers.values()] or repr(self.target.spec),
            self.target.spec.order,
            None if self.target.spec.placed is None else self.target.spec.placed.numbering,
        )

    def _from_plan(self, plan: Plan, settings: Settings) -> Decided:
        """The decision of a plan that was made for just this."""
        options, graph = settings.options, self.graph
        wanted = {
            "n_stages": (plan.n_stages, options.n_stages),
            "virtual_stages": (plan.virtual_stages, options.virtual),
            "dp": (plan.dp, options.dp),
            "microbatches": (plan.microbatches, settings.microbatches),
            **{name: (plan.options.get(name), ours) for name, ours in options.in_plan().items()},
        }
        for name, (theirs, ours) in wanted.items():
            if theirs != ours:
                raise PlanError(f"the plan has {name}={theirs}, this run {name}={ours}")
        if plan.fingerprint != self._fingerprint:
            what = (
                f"microbatches of ({plan.shape}), this run has ({self.spec})"
                if plan.shape != str(self.spec)
                else "another model, or the same one with other settings or library versions"
            )
            raise PlanError(f"the plan was made for {what}: make a new plan")
        placed = decide.apply(plan.decision, graph, self.locality)
        settings = settings.along(plan.decision)
        closing_s = [stages[0].closing_s for stages in plan.ranks]
        order = compute_only(from_text("\n".join(plan.schedule)))
        return Decided(
            settings, plan.decision, *placed, closing_s=closing_s, planned=True, order=order
        )

"""The partitioning problem as plain data, what a solution of it costs, and what makes one legal.

Units have to be put on stages 0 to S − 1, and each unit has to take one of its options. Each stage
is on a rank, which may hold several. Numbers only: any graph can be fed to the solvers
(`passes.partition.solve`, `passes.partition.baselines`).

    seconds of stage s   T_s = Σ option seconds of its units, on the device of its rank, + what it
                         sends to and receives from stages of other ranks, over the links between
    seconds of rank r    R_r = Σ T_s of its stages
    bytes of rank r      Σ static + the most of Σ in_flight[s] · Σ stash that its stages hold at
                         once + what is kept once + the largest transient of its units
                         + reserve_bytes[r]
    objective            max_weight · max R_r + sum_weight · Σ T_s

For 1F1B with m microbatches and one stage per rank the makespan is (m − 1) · max T_s + Σ T_s
(Narayanan et al., SC 2021, section 2.2); max_weight = 1, sum_weight = 0 is the time per microbatch
in the long run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .actions import placement_of
from .errors import PartitionError


@dataclass(frozen=True)
class Option:
    """One way to run a unit.

    Attributes:
        seconds: forward, backward and recomputation of one microbatch.
        stash_bytes: kept by every microbatch in flight, by no other unit.
        static_bytes: held all the time: weights, gradients, optimizer states.
        transient_bytes: the most that the unit needs besides while it runs.
        name: what it recomputes, for people.
        by_kind: the seconds on each kind of device, where there are several; ``seconds`` do not
            count then.
    """

    seconds: float
    stash_bytes: float = 0.0
    static_bytes: float = 0.0
    transient_bytes: float = 0.0
    name: str = ""
    by_kind: tuple[float, ...] = ()

    def on(self, kind: int) -> float:
        """Seconds on a kind of device."""
        return self.by_kind[kind] if self.by_kind else self.seconds


@dataclass(frozen=True)
class Value:
    """What one unit makes and others read: it travels to every other stage that reads it.

    Attributes:
        source, readers: units; a reader may come before the source (gradients).
        send_s: paid once by the source's stage if any reader is on another rank, over the slowest
            of the links to these.
        receive_s: paid once by every stage of another rank that has a reader, over its link.
    """

    source: int
    readers: tuple[int, ...]
    send_s: float = 0.0
    receive_s: float = 0.0


Users = tuple[tuple[int, frozenset[int] | None], ...]
"""(unit, its options that count; None for all of them)."""


@dataclass(frozen=True)
class Kept:
    """Bytes that several units share: taken once on every stage where any user is.

    Attributes:
        per_microbatch: times the stage's microbatches in flight (a stashed value), or once for all
            stages of a rank (a weight that several units read).
        unless: not on a stage where one of these is: the value is recomputed there.
    """

    bytes: float
    users: Users
    per_microbatch: bool = True
    unless: Users = ()


@dataclass(frozen=True)
class Link:
    """From one rank to another.

    Attributes:
        slower: by how much more than its seconds a value takes.
        latency_s: paid once by a stage for all that it receives from one other stage, if there is
            anything that takes time.
    """

    slower: float = 1.0
    latency_s: float = 0.0


PLAIN = Link()


@dataclass(frozen=True)
class Problem:
    """Units, their options and order, and what they share.

    Attributes:
        options: per unit, at least one.
        edges: (u, v): the stage of u is at most that of v. Together they have no cycle.
        together: groups of units that go to one stage.
        pins: unit -> its stage.
        homes: per stage, its rank; where it is left out, each stage has one of its own.
        in_flight: per stage, the most microbatches between forward and backward at once.
        together_in_flight: per rank, how many microbatches of each of its stages are in flight at
            once, in the moments that count; where it is left out, the most of every stage.
        budget_bytes: per rank; `math.inf` for no limit.
        reserve_bytes: per rank, held besides.
        kinds: per rank, the kind of its device; where it is left out, all are of kind 0.
        links: per sending rank, per receiving rank; where it is left out, all are alike.
        min_units: fewest units of a stage.
        labels: per unit, for messages.
    """

    options: tuple[tuple[Option, ...], ...]
    edges: tuple[tuple[int, int], ...]
    n_stages: int
    values: tuple[Value, ...] = ()
    kept: tuple[Kept, ...] = ()
    together: tuple[tuple[int, ...], ...] = ()
    pins: Mapping[int, int] = field(default_factory=dict)
    homes: tuple[int, ...] = ()
    in_flight: tuple[int, ...] = ()
    together_in_flight: tuple[tuple[tuple[int, ...], ...], ...] = ()
    budget_bytes: tuple[float, ...] = ()
    reserve_bytes: tuple[float, ...] = ()
    kinds: tuple[int, ...] = ()
    links: tuple[tuple[Link, ...], ...] = ()
    max_weight: float = 1.0
    sum_weight: float = 0.0
    min_units: int = 0
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.homes:
            object.__setattr__(self, "homes", tuple(range(self.n_stages)))
        for name, default, count in (
            ("in_flight", 1, self.n_stages),
            ("budget_bytes", math.inf, self.n_ranks),
            ("reserve_bytes", 0.0, self.n_ranks),
            ("kinds", 0, self.n_ranks),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, (default,) * count)
        if not self.together_in_flight:
            each = (tuple(self.in_flight[s] for s in stages) for stages in self.placement)
            object.__setattr__(self, "together_in_flight", tuple((most,) for most in each))

    @property
    def n_units(self) -> int:
        return len(self.options)

    @property
    def n_ranks(self) -> int:
        return max(self.homes) + 1

    @property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        """Per rank, its stages in order."""
        return placement_of(self.homes)

    @property
    def shares_ranks(self) -> bool:
        """Whether a rank holds several stages."""
        return self.n_ranks < self.n_stages

    @property
    def alike(self) -> bool:
        """Whether it does not matter which rank holds a unit, memory apart: all devices are of one
        kind, and all links too."""
        return len(set(self.kinds)) == 1 and not self.links

    def kind_of(self, stage: int) -> int:
        """Of the device of its rank."""
        return self.kinds[self.homes[stage]]

    def link(self, src: int, dst: int) -> Link:
        """From one stage to another, which is on another rank."""
        return self.links[self.homes[src]][self.homes[dst]] if self.links else PLAIN

    def fewest_s(self, kind: int | None = None) -> list[float]:
        """Per unit, the seconds of its fastest option on a kind of device; None for the kind where
        it is fastest."""
        kinds = set(self.kinds) if kind is None else (kind,)
        return [min(o.on(k) for o in each for k in kinds) for each in self.options]

    def label(self, unit: int) -> str:
        return self.labels[unit] if self.labels else f"unit {unit}"

    def ranks_s(self, stages_s: Sequence[float]) -> tuple[float, ...]:
        """Seconds of every rank, per microbatch, from those of its stages."""
        return tuple(math.fsum(stages_s[s] for s in stages) for stages in self.placement)

    def objective(self, stages_s: Sequence[float]) -> float:
        slowest = max(self.ranks_s(stages_s) if self.shares_ranks else stages_s)
        return self.max_weight * slowest + self.sum_weight * math.fsum(stages_s)

    def stages_s(self, stage: Sequence[int], option: Sequence[int]) -> tuple[float, ...]:
        """Seconds of every stage, per microbatch."""
        terms: list[list[float]] = [[] for _ in range(self.n_stages)]
        for unit, (s, k) in enumerate(zip(stage, option, strict=True)):
            terms[s].append(self.options[unit][k].on(self.kind_of(s)))
        met: set[tuple[int, int]] = set()
        for value in self.values:
            source = stage[value.source]
            elsewhere = {stage[r] for r in value.readers} - {source}
            elsewhere = {s for s in elsewhere if self.homes[s] != self.homes[source]}
            links = {s: self.link(source, s) for s in elsewhere}
            if links:
                terms[source].append(value.send_s * max(x.slower for x in links.values()))
            for s, link in links.items():
                terms[s].append(value.receive_s * link.slower)
                if (source, s) not in met and (value.send_s or value.receive_s):
                    met.add((source, s))
                    terms[s].append(link.latency_s)
        return tuple(math.fsum(term) for term in terms)

    def ranks_bytes(self, stage: Sequence[int], option: Sequence[int]) -> tuple[float, ...]:
        """Peak bytes of every rank."""
        totals = list(self.reserve_bytes)
        transient = [0.0] * self.n_ranks
        for unit, (s, k) in enumerate(zip(stage, option, strict=True)):
            chosen, rank = self.options[unit][k], self.homes[s]
            totals[rank] += chosen.static_bytes
            transient[rank] = max(transient[rank], chosen.transient_bytes)
        for kept in self.kept:
            if not kept.per_microbatch:
                for rank in {self.homes[s] for s in self.kept_on(kept, stage, option)}:
                    totals[rank] += kept.bytes
        stash = self.ranks_stash(stage, option)
        return tuple(a + b + c for a, b, c in zip(totals, stash, transient, strict=True))

    def ranks_stash(self, stage: Sequence[int], option: Sequence[int]) -> tuple[float, ...]:
        """Bytes that every rank keeps of all microbatches that it holds at once."""
        stash = self.stages_stash(stage, option)
        return tuple(
            max(
                math.fsum(n * stash[s] for n, s in zip(counts, stages_here, strict=True))
                for counts in self.together_in_flight[rank]
            )
            for rank, stages_here in enumerate(self.placement)
        )

    def stages_stash(self, stage: Sequence[int], option: Sequence[int]) -> list[float]:
        """Bytes of every stage that each microbatch in flight keeps."""
        stash = [0.0] * self.n_stages
        for unit, (s, k) in enumerate(zip(stage, option, strict=True)):
            stash[s] += self.options[unit][k].stash_bytes
        for kept in self.kept:
            for s in self.kept_on(kept, stage, option) if kept.per_microbatch else ():
                stash[s] += kept.bytes
        return stash

    def kept_on(self, kept: Kept, stage: Sequence[int], option: Sequence[int]) -> set[int]:
        """The stages on which shared bytes are taken."""

        def places(users: Users) -> set[int]:
            return {stage[u] for u, which in users if which is None or option[u] in which}

        return places(kept.users) - places(kept.unless)


@dataclass(frozen=True)
class Solution:
    """A legal assignment and what is known of it.

    Attributes:
        stage, option: per unit.
        stages_s: per stage.
        ranks_bytes: per rank.
        bound: no solution has a smaller objective.
        proven: the gap to the bound is closed.
        solver: what found it.
        seconds: that the search took.
        note: what the search has to say: a time limit, a fallback.
    """

    stage: tuple[int, ...]
    option: tuple[int, ...]
    stages_s: tuple[float, ...]
    ranks_bytes: tuple[float, ...]
    objective: float
    bound: float
    proven: bool
    solver: str
    seconds: float = 0.0
    note: str = ""

    @property
    def gap(self) -> float:
        """(objective − bound) / objective."""
        return (self.objective - self.bound) / self.objective if self.objective else 0.0


def solution_of(
    problem: Problem,
    stage: Sequence[int],
    option: Sequence[int],
    solver: str,
    *,
    bound: float = -math.inf,
    proven: bool = False,
    seconds: float = 0.0,
    note: str = "",
) -> Solution:
    """Evaluate an assignment; it need not fit into memory.

    Raises:
        PartitionError: it breaks an order, a group, a pin or the fewest units of a stage.
    """
    validate(problem, stage, option)
    stages_s = problem.stages_s(stage, option)
    return Solution(
        tuple(stage),
        tuple(option),
        stages_s,
        problem.ranks_bytes(stage, option),
        problem.objective(stages_s),
        bound,
        proven,
        solver,
        seconds,
        note,
    )


def validate(problem: Problem, stage: Sequence[int], option: Sequence[int]) -> None:
    """Raises PartitionError where an assignment is not legal, memory apart."""
    if len(stage) != problem.n_units or len(option) != problem.n_units:
        raise PartitionError(f"{len(stage)} stages for {problem.n_units} units")
    for unit, (s, k) in enumerate(zip(stage, option, strict=True)):
        if not 0 <= s < problem.n_stages or not 0 <= k < len(problem.options[unit]):
            raise PartitionError(f"{problem.label(unit)} is on stage {s} with option {k}")
    for u, v in problem.edges:
        if stage[u] > stage[v]:
            raise PartitionError(
                f"{problem.label(u)} (stage {stage[u]}) must not come after {problem.label(v)} "
                f"(stage {stage[v]})"
            )
    for group in problem.together:
        if len({stage[u] for u in group}) > 1:
            raise PartitionError(f"{problem.label(group[0])} is apart from its group")
    for unit, s in problem.pins.items():
        if stage[unit] != s:
            raise PartitionError(f"{problem.label(unit)} is pinned to stage {s}")
    for s in range(problem.n_stages):
        if sum(1 for t in stage if t == s) < problem.min_units:
            raise PartitionError(f"stage {s} has fewer than {problem.min_units} units")


def fits(problem: Problem, solution: Solution, tolerance: float = 1e-9) -> bool:
    """Whether every rank is within its budget."""
    pairs = zip(solution.ranks_bytes, problem.budget_bytes, strict=True)
    return all(used <= limit * (1 + tolerance) for used, limit in pairs)

"""Smaller problems with the same optimum: merged units, fewer options, a window of stages per unit.

reduce    problem  -> Reduced    groups, cycles, memory that cannot bind, dominated options
windows   problem  -> [(first, last)]    stages a unit can be on below a given stage time
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import networkx as nx

from ...compiler.ir.errors import PartitionError
from ...compiler.ir.problem import Kept, Option, Problem, Users, Value


@dataclass(frozen=True)
class Reduced:
    """A problem that stands for another one.

    Attributes:
        problem: its units are in an order that its edges allow.
        members: per unit, the units of the other problem that it stands for.
        choices: per unit and option, the option that each member takes.
    """

    problem: Problem
    members: tuple[tuple[int, ...], ...]
    choices: tuple[tuple[tuple[int, ...], ...], ...]

    def lift(
        self, stage: Sequence[int], option: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Stages and options of the other problem's units."""
        placed = {
            member: (stage[unit], choice)
            for unit, members in enumerate(self.members)
            for member, choice in zip(members, self.choices[unit][option[unit]], strict=True)
        }
        pairs = [placed[unit] for unit in range(len(placed))]
        return tuple(s for s, _ in pairs), tuple(k for _, k in pairs)


def reduce(problem: Problem) -> Reduced:
    """The smallest equivalent of a problem that is found quickly.

    Raises:
        PartitionError: its pins, groups, order and fewest units contradict each other.
    """
    groups = _groups(problem)
    check(problem, groups)
    return merge(_fewer_options(_without_memory(unreduced(problem))), groups)


def unreduced(problem: Problem) -> Reduced:
    """A problem that stands for itself."""
    return Reduced(
        problem,
        tuple((unit,) for unit in range(problem.n_units)),
        tuple(tuple((k,) for k in range(len(each))) for each in problem.options),
    )


def check(problem: Problem, groups: Sequence[Sequence[int]]) -> None:
    """Raises PartitionError where pins, groups, order and fewest units contradict each other."""
    n, wanted = problem.n_units, problem.n_stages * problem.min_units
    if wanted > n and problem.min_units == 1:
        raise PartitionError(
            f"n_stages={problem.n_stages}, but the model has only {n} units (runs of operators "
            f"between good cut points): use n_stages={n} or fewer"
        )
    if wanted > n:
        raise PartitionError(
            f"{problem.n_stages} stages of at least {problem.min_units} units need {wanted} "
            f"units, but the model has only {n}: use fewer stages"
        )
    for unit, stage in problem.pins.items():
        if not 0 <= stage < problem.n_stages:
            raise PartitionError(
                f"{problem.label(unit)} is pinned to stage {stage}, but the stages are 0 to "
                f"{problem.n_stages - 1}"
            )
    _check_pins(problem, groups)
    if problem.min_units and len(groups) < problem.n_stages:
        raise PartitionError(
            f"n_stages={problem.n_stages}, but what has to stay together leaves only "
            f"{len(groups)} groups of units: use n_stages={len(groups)} or fewer"
        )


def _check_pins(problem: Problem, groups: Sequence[Sequence[int]]) -> None:
    home = {unit: g for g, group in enumerate(groups) for unit in group}
    after: dict[int, set[int]] = {g: set() for g in range(len(groups))}
    for u, v in problem.edges:
        if home[u] != home[v]:
            after[home[u]].add(home[v])
    highest: dict[int, tuple[int, int]] = {}  # group -> (stage, unit): the last pin before it
    for g in _ordered(after, [min(group) for group in groups]):
        pinned = [(problem.pins[u], u) for u in groups[g] if u in problem.pins]
        for stage, unit in pinned:
            if stage != pinned[0][0]:
                first = problem.label(pinned[0][1])
                raise PartitionError(
                    f"{first} is pinned to stage {pinned[0][0]} and {problem.label(unit)} to "
                    f"stage {stage}, but the two have to be on one stage"
                )
            if g in highest and highest[g][0] > stage:
                before, other = highest[g]
                raise PartitionError(
                    f"{problem.label(other)} is pinned to stage {before} and "
                    f"{problem.label(unit)}, which must not come before it, to stage {stage}"
                )
        known = max([*pinned, *([highest[g]] if g in highest else [])], default=None)
        for other_group in after[g]:
            if known is not None:
                highest[other_group] = max(known, highest.get(other_group, known))


def _groups(problem: Problem) -> list[tuple[int, ...]]:
    """Units that share a stage in every solution: groups, and cycles through groups."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(problem.n_units))
    graph.add_edges_from(problem.edges)
    for group in problem.together:
        graph.add_edges_from(zip(group, (*group[1:], group[0]), strict=True))
    return [tuple(sorted(each)) for each in nx.strongly_connected_components(graph)]


def _ordered(after: dict[int, set[int]], rank: Sequence[int]) -> list[int]:
    """The nodes of a graph in topological order; of those that could be next, the lowest rank."""
    waits = dict.fromkeys(after, 0)
    for nexts in after.values():
        for node in nexts:
            waits[node] += 1
    ready = [(rank[node], node) for node, count in waits.items() if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        _, node = heapq.heappop(ready)
        order.append(node)
        for other in after[node]:
            waits[other] -= 1
            if not waits[other]:
                heapq.heappush(ready, (rank[other], other))
    return order


def merge(reduced: Reduced, groups: Iterable[Sequence[int]]) -> Reduced:
    """One unit per group; units with a choice of options stay, in a group with ``together``.

    The groups hold every unit of ``reduced.problem`` once.
    """
    problem = reduced.problem
    groups = [tuple(group) for group in groups]
    home = {unit: g for g, group in enumerate(groups) for unit in group}
    after: dict[int, set[int]] = {g: set() for g in range(len(groups))}
    for u, v in problem.edges:
        if home[u] != home[v]:
            after[home[u]].add(home[v])
    order = _ordered(after, [min(group) for group in groups])

    parts: list[tuple[int, ...]] = []  # old units of every new unit
    leader: dict[int, int] = {}  # group -> its first new unit
    together = []
    for g in order:
        split = _split(problem, groups[g])
        leader[g] = len(parts)
        if len(split) > 1:
            together.append(tuple(range(len(parts), len(parts) + len(split))))
        parts += split
    new = {unit: i for i, part in enumerate(parts) for unit in part}
    smaller = replace(
        problem,
        options=tuple(_joint_options(problem, part) for part in parts),
        edges=_transitive(
            [(leader[g], leader[other]) for g in order for other in after[g]], len(parts)
        ),
        values=_merged_values(problem, new),
        kept=_merged_kept(problem, new),
        together=tuple(together),
        pins={new[unit]: stage for unit, stage in problem.pins.items()},
        labels=tuple(problem.label(part[0]) for part in parts),
    )
    return Reduced(
        smaller,
        tuple(tuple(m for u in part for m in reduced.members[u]) for part in parts),
        tuple(
            tuple(
                tuple(
                    choice
                    for u in part
                    for choice in reduced.choices[u][k if len(reduced.choices[u]) > 1 else 0]
                )
                for k in range(len(_joint_options(problem, part)))
            )
            for part in parts
        ),
    )


def _split(problem: Problem, group: Sequence[int]) -> list[tuple[int, ...]]:
    """A group as few units: at most one member of each has a choice of options."""
    if problem.min_units > 1:  # counts units, so all of them have to stay
        return [(unit,) for unit in group]
    free = [unit for unit in group if len(problem.options[unit]) > 1]
    fixed = [unit for unit in group if len(problem.options[unit]) == 1]
    if not free:
        return [tuple(fixed)]
    return [(free[0], *fixed), *((unit,) for unit in free[1:])]


def _joint_options(problem: Problem, part: Sequence[int]) -> tuple[Option, ...]:
    if len(part) == 1:
        return problem.options[part[0]]
    count = max(len(problem.options[unit]) for unit in part)
    joint = []
    for k in range(count):
        each = [problem.options[u][k if len(problem.options[u]) > 1 else 0] for u in part]
        joint.append(
            Option(
                math.fsum(option.seconds for option in each),
                math.fsum(option.stash_bytes for option in each),
                math.fsum(option.static_bytes for option in each),
                max(option.transient_bytes for option in each),
                each[0].name,
                _joint_seconds(each),
            )
        )
    return tuple(joint)


def _joint_seconds(each: Sequence[Option]) -> tuple[float, ...]:
    """Of several options together, on each kind of device."""
    kinds = range(max(len(option.by_kind) for option in each))
    return tuple(math.fsum(option.on(kind) for option in each) for kind in kinds)


def _transitive(edges: Iterable[tuple[int, int]], n: int) -> tuple[tuple[int, int], ...]:
    """The edges that no path of others implies; every edge leads to a higher number."""
    after: list[list[int]] = [[] for _ in range(n)]
    for u, v in set(edges):
        after[u].append(v)
    reach = [0] * n
    kept = []
    for u in reversed(range(n)):
        for v in sorted(after[u]):  # what v reaches is higher than v
            if not reach[u] >> v & 1:
                kept.append((u, v))
                reach[u] |= reach[v] | 1 << v
    return tuple(sorted(kept))


def _merged_values(problem: Problem, new: dict[int, int]) -> tuple[Value, ...]:
    """Values with the same ends travel together: their costs add up."""
    costs: dict[tuple[int, tuple[int, ...]], tuple[list[float], list[float]]] = {}
    for value in problem.values:
        source = new[value.source]
        readers = tuple(sorted({new[reader] for reader in value.readers} - {source}))
        if readers and (value.send_s or value.receive_s):
            send, receive = costs.setdefault((source, readers), ([], []))
            send.append(value.send_s)
            receive.append(value.receive_s)
    return tuple(
        Value(source, readers, math.fsum(send), math.fsum(receive))
        for (source, readers), (send, receive) in costs.items()
    )


def _merged_kept(problem: Problem, new: dict[int, int]) -> tuple[Kept, ...]:
    def renamed(users: Users) -> Users:
        found = set()
        for unit, which in users:
            if len(problem.options[unit]) > 1:
                found.add((new[unit], which))
            elif which is None or 0 in which:
                found.add((new[unit], None))
        return tuple(sorted(found, key=lambda user: (user[0], sorted(user[1] or ()))))

    renewed = (
        replace(kept, users=renamed(kept.users), unless=renamed(kept.unless))
        for kept in problem.kept
    )
    return tuple(kept for kept in renewed if kept.users)


def _without_memory(reduced: Reduced) -> Reduced:
    """Drops limits that hold even if everything is on one rank with its largest option."""
    problem = reduced.problem
    if not any(math.isfinite(budget) for budget in problem.budget_bytes):
        return replace(reduced, problem=replace(problem, kept=()))
    transient = max(option.transient_bytes for each in problem.options for option in each)
    ranks = zip(problem.budget_bytes, problem.reserve_bytes, problem.placement, strict=True)
    for budget, reserve, stages in ranks:
        f = max(problem.in_flight[s] for s in stages)
        most = math.fsum(
            max(option.static_bytes + f * option.stash_bytes for option in each)
            for each in problem.options
        )
        copies = sum(problem.in_flight[s] for s in stages)  # one on each of the rank's stages
        shared = math.fsum(
            kept.bytes * (copies if kept.per_microbatch else 1) for kept in problem.kept
        )
        if reserve + most + shared + transient > budget:
            return reduced
    free = replace(problem, kept=(), budget_bytes=(math.inf,) * problem.n_ranks)
    return replace(reduced, problem=free)


def _fewer_options(reduced: Reduced) -> Reduced:
    """Drops options that another one beats in time and bytes, shared bytes included."""
    problem = reduced.problem
    limited = any(math.isfinite(budget) for budget in problem.budget_bytes)
    kinds = sorted(set(problem.kinds))
    named: dict[int, list[tuple[frozenset[int], bool]]] = {}
    for kept in problem.kept:
        for users, good in ((kept.users, False), (kept.unless, True)):
            for unit, which in users:
                if which is not None:
                    named.setdefault(unit, []).append((which, good))

    def beats(unit: int, k: int, other: int) -> bool:
        a, b = problem.options[unit][k], problem.options[unit][other]
        costs = [(a.on(kind), b.on(kind)) for kind in kinds]
        if limited:
            costs += [
                (a.stash_bytes, b.stash_bytes),
                (a.static_bytes, b.static_bytes),
                (a.transient_bytes, b.transient_bytes),
                *(
                    (float((k in which) != good), float((other in which) != good))
                    for which, good in named.get(unit, ())
                ),
            ]
        no_worse = all(mine <= theirs for mine, theirs in costs)
        return no_worse and (k < other or any(mine < theirs for mine, theirs in costs))

    chosen = [
        [k for k in range(len(each)) if not any(beats(u, o, k) for o in range(len(each)) if o != k)]
        for u, each in enumerate(problem.options)
    ]

    def renamed(users: Users) -> Users:
        return tuple(
            (
                u,
                None
                if which is None
                else frozenset(i for i, k in enumerate(chosen[u]) if k in which),
            )
            for u, which in users
        )

    smaller = replace(
        problem,
        options=tuple(
            tuple(problem.options[u][k] for k in which) for u, which in enumerate(chosen)
        ),
        kept=tuple(
            replace(kept, users=renamed(kept.users), unless=renamed(kept.unless))
            for kept in problem.kept
        ),
    )
    choices = tuple(tuple(reduced.choices[u][k] for k in which) for u, which in enumerate(chosen))
    return Reduced(smaller, reduced.members, choices)

"""Which unit goes to which stage and what it recomputes: what ranks share and plans keep."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from ..passes.placement import Placement, place
from ..passes.problem import Solution
from ..passes.stash import Stash
from .errors import OptionError, PlanError
from .graph import JointGraph, Phase, is_getitem, module_of, phase_of, storage_root
from .locality import Locality
from .units import Unit


@dataclass(frozen=True)
class UnitPrices:
    """Seconds of one unit per microbatch.

    Attributes:
        recompute_s: of each option.
    """

    forward_s: float
    backward_s: float
    recompute_s: tuple[float, ...]

    def of(self, option: int) -> tuple[float, float, float]:
        return self.forward_s, self.backward_s, float(self.recompute_s[option])


@dataclass(frozen=True)
class Search:
    """What the solver knows of a decision.

    Attributes:
        objective_s, bound_s: seconds of a step, as the partitioning problem prices it.
        proven: no better one exists.
        solver: what found it.
        note: a time limit, a fallback.
        seconds: that the search took.
    """

    objective_s: float
    bound_s: float
    proven: bool
    solver: str
    note: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def gap(self) -> float:
        return (self.objective_s - self.bound_s) / self.objective_s if self.objective_s else 0.0


@dataclass(frozen=True)
class Decision:
    """Stages and recomputation of one joint graph.

    Attributes:
        fingerprint: of the graph.
        unit_nodes: how many forward nodes each unit has, in execution order.
        unit_stage: the stage of each unit.
        unit_recomputes: what each unit recomputes, for people.
        unit_seconds: of a microbatch: forward, backward, recomputation.
        recomputed: names of the forward nodes that the backward computes again.
    """

    fingerprint: str
    unit_nodes: tuple[int, ...]
    unit_stage: tuple[int, ...]
    unit_recomputes: tuple[str, ...]
    unit_seconds: tuple[tuple[float, float, float], ...]
    recomputed: tuple[str, ...]
    search: Search

    def scaled(self, stages_s: Mapping[int, tuple[float, float]]) -> Decision:
        """With seconds that add up to those of the stages: forward, and all of the backward."""
        pairs = list(zip(self.unit_stage, self.unit_seconds, strict=True))
        seconds: list[tuple[float, float, float]] = []
        for stage, unit in pairs:
            mine = [other for s, other in pairs if s == stage]
            forward = stages_s[stage][0] / (math.fsum(f for f, _, _ in mine) or 1.0)
            backward = stages_s[stage][1] / (math.fsum(b + r for _, b, r in mine) or 1.0)
            seconds.append((unit[0] * forward, unit[1] * backward, unit[2] * backward))
        return replace(self, unit_seconds=tuple(seconds))

    def check(self, n_stages: int) -> None:
        """Raises ValueError where the parts do not fit together."""
        lists = (self.unit_nodes, self.unit_stage, self.unit_recomputes, self.unit_seconds)
        if len({len(each) for each in lists}) > 1:
            raise ValueError("its lists of units differ in length")
        if not set(self.unit_stage) <= set(range(n_stages)) or min(self.unit_nodes, default=1) < 1:
            raise ValueError(f"units are on stages {sorted(set(self.unit_stage))} of {n_stages}")


def decision_of(
    fingerprint: str,
    units: Sequence[Unit],
    menus: Sequence[Sequence[Stash]],
    prices: Sequence[UnitPrices],
    solution: Solution,
) -> Decision:
    chosen = [menu[k] for menu, k in zip(menus, solution.option, strict=True)]
    names = sorted(node.name for stash in chosen for node in stash.recomputed)
    return Decision(
        fingerprint,
        tuple(len(unit.nodes) for unit in units),
        solution.stage,
        tuple(stash.label for stash in chosen),
        tuple(price.of(k) for price, k in zip(prices, solution.option, strict=True)),
        tuple(names),
        Search(
            solution.objective,
            max(solution.bound, 0.0),
            solution.proven,
            solution.solver,
            solution.note,
            solution.seconds,
        ),
    )


def apply(
    decision: Decision, graph: JointGraph, locality: Locality
) -> tuple[Placement, frozenset[fx.Node]]:
    """The stage of every staged node, and the nodes to recompute.

    Raises:
        PlanError: the decision is not about this graph.
    """
    nodes = [n for n in locality.staged if phase_of(n) is Phase.FORWARD]
    if sum(decision.unit_nodes) != len(nodes):
        raise PlanError(
            f"the plan divides {sum(decision.unit_nodes)} operators, the model has {len(nodes)}: "
            "make a new plan"
        )
    stages = [
        s
        for count, s in zip(decision.unit_nodes, decision.unit_stage, strict=True)
        for _ in range(count)
    ]
    named = {node.name: node for node in nodes}
    unknown = next((name for name in decision.recomputed if name not in named), None)
    if unknown is not None:
        raise PlanError(f"the plan recomputes {unknown!r}, which the model has not: make a new one")
    placement = place(graph, locality, dict(zip(nodes, stages, strict=True)))
    return placement, frozenset(named[name] for name in decision.recomputed)


def pinned_nodes(
    graph: JointGraph, locality: Locality, pin: Mapping[str, int], names: Iterable[str]
) -> dict[fx.Node, int]:
    """The forward nodes that ``pin=`` puts on a stage.

    Args:
        pin: FQN of a module or a parameter -> stage.
        names: the FQNs of all modules and parameters.

    Raises:
        OptionError: an unknown FQN, one that computes nothing, or nodes pinned twice.
    """
    known = set(names)
    owner = graph.owners
    found: dict[fx.Node, tuple[str, int]] = {}
    for name, stage in pin.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else "give the dotted name of a module"
            raise OptionError(f"pin={{{name!r}: {stage}}}: the model has no {name!r}: {hint}")
        mine = [
            node
            for node in locality.staged
            if phase_of(node) is Phase.FORWARD
            and (
                f"{module_of(node)}.".startswith(f"{name}.")
                or any(owner.get(storage_root(a)) == name for a in node.all_input_nodes)
            )
        ]
        if not mine:
            raise OptionError(f"pin={{{name!r}: {stage}}} has no effect: {name} computes nothing")
        for node in mine:
            other = found.setdefault(node, (name, stage))
            if other[1] != stage:
                raise OptionError(
                    f"pin= puts {node.name} in {module_of(node) or 'the model'} on stage "
                    f"{other[1]} for {other[0]!r} and on stage {stage} for {name!r}: give one"
                )
    for node in locality.staged:  # an item of an op's results stays with the op
        if is_getitem(node) and node.args[0] in found:
            found.setdefault(node, found[node.all_input_nodes[0]])
    return {node: stage for node, (_, stage) in found.items()}

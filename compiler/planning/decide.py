"""A solution of the partitioning problem -> a decision; a decision -> stages of a graph's nodes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from ...passes.graph.placement import Placement, place
from ..ir.errors import OptionError, PlanError
from ..ir.graph import JointGraph, Phase, is_getitem, module_of, phase_of, storage_root
from ..ir.locality import Locality
from ..ir.problem import Solution
from ..plan.decision import Decision, Search
from ..units.pricing import UnitPrices
from ..units.stash import Stash
from ..units.units import Unit


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
    whole = [name for kept in decision.kept for name in (*kept.params, *kept.grads)]
    unknown = next((name for name in whole if name not in graph.params), None)
    if unknown is not None:
        raise PlanError(f"the plan keeps {unknown!r} whole, which the model has not: make another")
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

"""Copies of a layer's operators in a joint graph, forward and backward, for layers left out of it.

The graph was made of a shortened forward, in which of a run the period *kept* is followed by the
period *next*, all of those between them left out. Both have a piece of the forward, and of the
backward, in which they come the other way round::

    … │ kept │ next │ …  loss  … │ next │ kept │ …
              ↑                          ↑
       copies 1 … T                copies T … 1

If `next` is `kept` moved on by one period, in both halves, then so is every period between. Names,
and the numbers that a forward operator and its backward share, go on as torch would have counted.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from ..ir.graph import JointGraph, Phase, module_of, phase_of, tensors
from ..tensors.facts import layout_of, storage_of
from .runs import Run, moved

KNOWN = {"val", "phase", "partner", "module"}  # of a node
PIECES = BEFORE, KEPT, NEXT, LATER = range(4)
_COUNTED = re.compile(r"(.*?)_(\d+)")

Place = tuple[Phase, int, int]
"""The phase of a piece, which one, and the place of an operator in it."""


class DifferentError(Exception):
    """The periods of a run are not alike once they are differentiated."""


def replicated(
    graph: JointGraph,
    runs: Sequence[Run],
    states: Mapping[str, fx.Node],
    constant: Callable[[str], object],
    order: Sequence[str],
) -> JointGraph:
    """The graph with all periods of the runs.

    Args:
        order: of the parameters, as their gradients are listed.
        states: what the exported graph calls a parameter or a buffer -> its node.
        constant: the value of what it calls otherwise.

    Raises:
        DifferentError: they cannot be told from those that it has.
    """
    for run in runs:
        inside = run.container.removeprefix("model").removeprefix(".")
        graph, twin = _Copying(graph, replace(run, container=inside), states, constant).copied()
        states = {name: twin[node] for name, node in states.items()}
    if runs:
        graph.grads = {name: graph.grads[name] for name in order if name in graph.grads}
        graph.set_output()
    return graph


class _Copying:
    """Of the periods that one run lacks.

    Attributes:
        pieces: by phase and number; empty ones where there is nothing.
        places: of all operators in them.
        step: a forward operator's number in `NEXT` minus that in `KEPT`.
        ends: the least numbers of `KEPT` and of `NEXT`.
        names: per phase, by how much what is counted in a name grows with a period.
    """

    def __init__(
        self,
        graph: JointGraph,
        run: Run,
        states: Mapping[str, fx.Node],
        constant: Callable[[str], object],
    ):
        self.graph, self.run = graph, run
        self.pieces = _forward(graph, run)
        starts = [_least(self.pieces[Phase.FORWARD, piece]) for piece in PIECES]
        self.ends = starts[KEPT], starts[NEXT]
        if graph.trains:
            self.pieces |= _backward(graph, starts, self.pieces[Phase.FORWARD, LATER])
        self.places: dict[fx.Node, Place] = {
            node: (*key, i) for key, nodes in self.pieces.items() for i, node in enumerate(nodes)
        }
        self.step = starts[NEXT] - starts[KEPT]
        names = ({}, *run.states)
        self.names = {phase: self._names(phase) for phase in Phase}
        self.own = [{states[a]: states[b] for a, b in of.items() if a in states} for of in names]
        self.values = [
            {_memory(constant(a)): constant(b) for a, b in of.items() if a not in states}
            for of in names
        ]
        self._next = self.own[-1]
        self._check_states()
        self._shared: set[tuple[fx.Node, fx.Node]] = set()
        self._moved: set[tuple[fx.Node, fx.Node]] = set()
        for phase in Phase:
            self._check(phase)
        self.grads = self._check_uses()
        self.made, self.constants = fx.Graph(), nn.Module()
        self.twin: dict[fx.Node, fx.Node] = {}
        self.copies: list[dict[tuple[Phase, int], fx.Node]] = [{} for _ in range(run.count + 2)]

    def _piece(self, phase: Phase, piece: int) -> Sequence[fx.Node]:
        return self.pieces.get((phase, piece), ())

    def _pairs(self, phase: Phase) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Operators of `KEPT`, and those in their places in `NEXT`."""
        return zip(self._piece(phase, KEPT), self._piece(phase, NEXT), strict=True)

    # -- whether one is the other, moved on by a period -------------------------------------------

    def _check_states(self) -> None:
        """That nothing else reads what the copies read of their own: it has no gradient yet."""
        own = [node for of in self.own[1:-1] for node in of.values()]
        if len(set(own)) < len(own) or any(node.users for node in own):
            raise DifferentError("a layer's state is read elsewhere")

    def _check(self, phase: Phase) -> None:
        if len(self._piece(phase, KEPT)) != len(self._piece(phase, NEXT)):
            raise DifferentError(f"{phase}: other operators")
        by = self.run.following - self.run.kept
        for node, other in self._pairs(phase):
            same = node.op == other.op and (node.op == "get_attr" or node.target is other.target)
            where = moved(module_of(node), self.run.container, by) == module_of(other)
            told = set(node.meta) | set(other.meta) <= KNOWN and phase_of(node) is phase_of(other)
            if not (same and where and told and _looks(node) == _looks(other)):
                raise DifferentError(f"{node.name} is not {other.name}")
            if node.op == "get_attr" and _memory(self._value(other, None)) != _memory(
                self._value(node, len(self.values) - 1)
            ):
                raise DifferentError(f"{node.name} and {other.name} are other constants")
            if _partner(other) - _partner(node) not in (0, self.step):
                raise DifferentError(f"{node.name} and {other.name} belong to other operators")
            self._check_operands(node, node.args, other.args)
            self._check_operands(node, dict(node.kwargs), dict(other.kwargs))
        if self._shared & self._moved:
            raise DifferentError("an operator reads what is shared twice")

    def _check_operands(self, reader: fx.Node, value: Any, other: Any) -> None:
        if type(value) is not type(other):
            raise DifferentError(f"{value} is not {other}")
        if isinstance(value, fx.Node):
            expected: fx.Node | None = self._next.get(value, value)
            place = self.places.get(value)
            if place is not None and value is other and place[1] in (BEFORE, LATER):
                self._shared.add((reader, value))
            elif place is not None:
                self._moved.add((reader, value))
                phase, piece, i = place
                following = self._piece(phase, piece + 1)
                expected = following[i] if i < len(following) else None
            if expected is not other:
                raise DifferentError(f"{value} is not followed by {other}")
        elif isinstance(value, (list, tuple)):
            if len(value) != len(other):
                raise DifferentError(f"{value} is not {other}")
            for a, b in zip(value, other, strict=True):
                self._check_operands(reader, a, b)
        elif isinstance(value, dict):
            self._check_operands(reader, list(value.items()), list(other.items()))
        elif value != other or repr(value) != repr(other):  # -0.0
            raise DifferentError(f"{value} is not {other}")

    def _check_uses(self) -> dict[str, int]:
        """That what is in the pieces is read where copies are read too.

        Returns:
            of each parameter of `KEPT` that has a gradient: its place in the backward.
        """
        ends = set(self.graph.results) | set(self.graph.mutations.values()) | {self.graph.loss}
        for piece, near in ((KEPT, (BEFORE, KEPT, NEXT)), (NEXT, (KEPT, NEXT, LATER))):
            for phase in Phase:
                last = piece == KEPT and phase is Phase.BACKWARD  # what follows reads it as it is
                for node in self._piece(phase, piece):
                    read = (user for user in node.users if user.op != "output")
                    places = (self.places.get(user, (phase, -1, 0)) for user in read)
                    if node in ends or not (last or all(at[1] in near for at in places)):
                        raise DifferentError(f"{node.name} is read elsewhere")
        owners, found = self.graph.owners, dict[str, int]()
        for node, other in self._next.items():
            if node not in owners:
                continue
            grads = [self.graph.grads.get(owners[each]) for each in (node, other)]
            at = [self.places.get(grad) if grad is not None else None for grad in grads]
            i = -1 if at[0] is None else at[0][2]
            if at == [(Phase.BACKWARD, KEPT, i), (Phase.BACKWARD, NEXT, i)]:
                found[owners[node]] = i
            elif grads != [None, None]:
                raise DifferentError(f"the gradient of {owners[node]} is made elsewhere")
        return found

    def _names(self, phase: Phase) -> dict[str, int]:
        found: dict[str, int] = {}
        for node, other in zip(self._piece(phase, KEPT), self._piece(phase, NEXT), strict=False):
            (base, count), (_, later) = _counted(node), _counted(other)
            found.setdefault(base, later - count if phase is Phase.FORWARD else count - later)
        return found

    # -- copying ----------------------------------------------------------------------------------

    def copied(self) -> tuple[JointGraph, dict[fx.Node, fx.Node]]:
        """The graph with the copies, and each node's twin there."""
        count, phases = self.run.count, (Phase.FORWARD, Phase.BACKWARD)
        forward, backward = (self._piece(phase, KEPT) for phase in phases)
        behind = {forward[-1]: Phase.FORWARD}
        if backward:
            behind[self._piece(Phase.BACKWARD, NEXT)[-1]] = Phase.BACKWARD
        grown = {Phase.FORWARD: 0, Phase.BACKWARD: 0}  # periods that are copied so far
        for node in self.graph.graph.nodes:
            if node.op == "output":
                continue
            self.twin[node] = self._copy(node, None, grown)
            if (phase := behind.get(node)) is not None:
                order = range(1, count + 1)
                for period in order if phase is Phase.FORWARD else reversed(order):
                    self._copy_piece(phase, period, grown)
                grown[phase] = count
        made = replace(self.graph.moved(self.made, self.twin), constants=self.constants)
        made.grads |= self._grads()
        return made, self.twin

    def _copy_piece(self, phase: Phase, period: int, grown: dict[Phase, int]) -> None:
        grown[phase] = period if phase is Phase.FORWARD else self.run.count - period
        for i, node in enumerate(self._piece(phase, KEPT)):
            self.copies[period][phase, i] = self._copy(node, period, grown)

    def _copy(self, node: fx.Node, period: int | None, grown: Mapping[Phase, int]) -> fx.Node:
        """Args:
        period: of the copy; None for the node itself.
        """
        find: Callable[[fx.Node], fx.Node] = partial(self._operand, node, period)
        args, kwargs = fx.node.map_arg(node.args, find), fx.node.map_arg(node.kwargs, find)
        name, target = node.name, node.target
        if node.op == "get_attr":
            name = target = f"constant_{len(self.constants._buffers)}"
            self.constants.register_buffer(name, self._value(node, period))
        elif node.op == "call_function":
            base, count = _counted(node)
            more = sum(grown[phase] * self.names[phase].get(base, 0) for phase in Phase)
            name = f"{base}_{count + more}" if count + more else base
        made = self.made.create_node(node.op, target, args, kwargs, name, node.type)
        made.meta = dict(node.meta)
        if node.op == "call_function" and "partner" in made.meta:
            made.meta["partner"] = self._number(node, period)
        if period is not None and node.op == "call_function":
            by = period * self.run.layers
            made.meta["module"] = moved(module_of(node), self.run.container, by)
        return made

    def _operand(self, reader: fx.Node, period: int | None, node: fx.Node) -> fx.Node:
        """What is read in the place of a node."""
        place, mine = self.places.get(node), self.places.get(reader)
        if period is not None:
            if node in self.own[period]:
                return self.twin[self.own[period][node]]
            if place is None or (reader, node) in self._shared:
                return self.twin[node]
            return self._at(period + place[1] - KEPT, place)
        if mine is not None and place is not None:
            if (mine[1], place[1]) == (NEXT, KEPT):
                return self._at(self.run.count, place)
            if (mine[1], place[1]) == (KEPT, NEXT):
                return self._at(1, place)
        return self.twin[node]

    def _value(self, node: fx.Node, period: int | None) -> torch.Tensor:
        """Of a constant, in a period: its own, or one that all share."""
        value = getattr(self.graph.constants, str(node.target))
        own = value if period is None else self.values[period].get(_memory(value), value)
        if not isinstance(own, torch.Tensor) or layout_of(own) != layout_of(value):
            raise DifferentError(f"{node.name} is another constant")
        return own.detach()

    def _at(self, period: int, place: Place) -> fx.Node:
        """The operator in a place of a period: `KEPT` is 0, `NEXT` is behind the last copy."""
        phase, _, i = place
        if period in (0, self.run.count + 1):
            return self.twin[self._piece(phase, NEXT if period else KEPT)[i]]
        return self.copies[period][phase, i]

    def _number(self, node: fx.Node, period: int | None) -> int:
        number, count = _partner(node), self.run.count
        place = self.places.get(node)
        if place is not None and place[1] in (KEPT, NEXT):
            phase, piece, i = place
            first, later = (_partner(self._piece(phase, each)[i]) for each in (KEPT, NEXT))
            if later - first:
                return number + self.step * (count if piece == NEXT else period or 0)
        return number + self.step * count if number >= self.ends[1] else number

    def _grads(self) -> dict[str, fx.Node]:
        owners, found = self.graph.owners, dict[str, fx.Node]()
        for period in range(1, self.run.count + 1):
            for node, other in self.own[period].items():
                if owners.get(node) in self.grads:
                    at = Phase.BACKWARD, self.grads[owners[node]]
                    found[owners[other]] = self.copies[period][at]
        return found


# -- pieces ---------------------------------------------------------------------------------------


def _forward(graph: JointGraph, run: Run) -> dict[tuple[Phase, int], list[fx.Node]]:
    """They begin where the first operator of a period's first layer is."""
    nodes = list(graph.ops(Phase.FORWARD))
    wanted = [run.kept - run.layers, run.kept, run.following, run.following + run.layers]
    paths = {moved(f"{run.container}.0", run.container, number): number for number in wanted}
    firsts: dict[int, int] = {}
    last = run.following + 2 * run.layers
    if not run.ends:
        paths[f"{run.container}.{last}"] = last
    for i, node in enumerate(nodes):
        path = module_of(node)
        for start, number in paths.items():
            if number not in firsts and f"{path}.".startswith(f"{start}."):
                firsts[number] = i
    if any(number not in firsts for number in [*paths.values()][1:]):
        raise DifferentError("a layer has no operators")
    if run.ends:  # as long as the one before it
        firsts[last] = 2 * firsts[wanted[LATER]] - firsts[wanted[NEXT]]
    starts = [firsts.get(number, firsts[run.kept]) for number in (*wanted, last)]
    if starts != sorted(starts):
        raise DifferentError("layers do not follow each other")
    return {(Phase.FORWARD, i): nodes[starts[i] : starts[i + 1]] for i in PIECES}


def _backward(
    graph: JointGraph, starts: Sequence[int], later: Sequence[fx.Node]
) -> dict[tuple[Phase, int], list[fx.Node]]:
    """They begin where the first operator is that belongs to one of the forward's.

    Args:
        starts: the least numbers of the forward's pieces.
        later: the last of these.
    """
    nodes = list(graph.ops(Phase.BACKWARD))

    def first(low: int, high: int) -> int:
        found = (i for i, node in enumerate(nodes) if low <= _partner(node) < high)
        return next(found, len(nodes))

    bounds = [0, *starts[KEPT:], 1 + max(map(_partner, later))]
    cuts = [first(a, b) for a, b in itertools.pairwise(bounds)][::-1]
    if cuts != sorted(cuts):
        raise DifferentError("the backward is in another order")
    ranges = zip(cuts, [*cuts[1:], len(nodes)], strict=True)
    return {
        (Phase.BACKWARD, piece): nodes[a:b]
        for piece, (a, b) in zip(reversed(PIECES), ranges, strict=True)
    }


def _partner(node: fx.Node) -> int:
    return int(node.meta.get("partner", -1))


def _least(nodes: Sequence[fx.Node]) -> int:
    return min((n for n in map(_partner, nodes) if n >= 0), default=0)


def _looks(node: fx.Node) -> list[object]:
    return list(map(layout_of, tensors(node.meta.get("val"))))


def _memory(value: object) -> int:
    """Where a constant lies."""
    return storage_of(value) if isinstance(value, torch.Tensor) else -1


def _counted(node: fx.Node) -> tuple[str, int]:
    """What a name is made of."""
    found = _COUNTED.fullmatch(node.name)
    return (node.name, 0) if found is None else (found[1], int(found[2]))

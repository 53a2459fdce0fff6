"""Where an exported graph repeats itself: layers of numbered modules, one after the other.

A *period* is one such layer, or a few, where kinds of layers take turns. Its *piece* of the graph
are the operators from its first one to the first of the next period. Pieces are alike if they have
the same operators, place by place, on operands that are the same for both, in the same place of
the same piece, in the same place of the piece before, or parameters of their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from ..ir.graph import behind, module_path, tensors, written
from ..ir.region import is_region
from ..tensors.facts import layout_of
from ..tensors.fakes import is_symbol

FEWEST = 8  # periods that are worth it
LONGEST = 6  # layers of a period
_NUMBERED = re.compile(r"(?:(.*?)\.)?(\d+)(?=\.|$)")

Names = Mapping[str, str]
"""The state that a piece reads -> that in the same places of another piece."""


@dataclass(frozen=True)
class Run:
    """Periods that are alike, of which those in the middle need not be differentiated.

    Attributes:
        container: the path of the module whose numbered children they are.
        layers: of a period.
        kept: the number of the first layer of the last period before those left out.
        pieces: operators of that one, and of those that are left out.
        states: per period that is left out, and for the next one, what it reads for what the kept
            one reads.
        ends: but one period follows the next one.
    """

    container: str
    layers: int
    kept: int
    pieces: Sequence[Sequence[fx.Node]]
    states: Sequence[Names]
    ends: bool = False

    def shorter(self) -> Run:
        """With one period less that is left out, where but one follows the next one."""
        if not self.ends:
            return self
        return replace(self, pieces=self.pieces[:-1], states=self.states[:-1], ends=False)

    @property
    def count(self) -> int:
        """Periods that are left out."""
        return len(self.states) - 1

    @property
    def following(self) -> int:
        """The number of the first layer behind those left out."""
        return self.kept + self.layers * (self.count + 1)


@dataclass
class _Pieces:
    """The periods of one container.

    Attributes:
        nodes: per period; those of the last one are not known, as nothing tells where it ends.
        own: per period but the first, what it reads for what the one before reads.
        shared: the state that the last period that was looked at shares with the next one.
    """

    nodes: list[list[fx.Node]]
    place: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    own: dict[int, Names] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for period, nodes in enumerate(self.nodes):
            self.place |= {node: (period, i) for i, node in enumerate(nodes)}

    def alike(self, period: int, moved: Sequence[str]) -> bool:
        """Whether a period is like the one after it.

        Args:
            moved: paths of modules of the one, as they are in the other, by place.
        """
        mine, theirs = self.nodes[period], self.nodes[period + 1]
        names: dict[str, str] = {}
        self.shared = set()
        if len(mine) != len(theirs):
            return False
        for node, other, path in zip(mine, theirs, moved, strict=True):
            if node.target is not other.target or module_path(other) != path:
                return False
            if _looks(node) != _looks(other) or not self._writes_inside(node, period):
                return False
            pairs: list[tuple[Any, Any]] = [(node.args, other.args)]
            pairs.append((dict(node.kwargs), dict(other.kwargs)))
            if not all(self._same(a, b, period, names) for a, b in pairs):
                return False
        self.own[period + 1] = names
        mixed = self.shared & (names.keys() | set(names.values()))
        return not mixed and len(set(names.values())) == len(names)

    def go_on(self, period: int) -> bool:
        """Whether what a period reads of its own for the one before is what the next one's is
        for: no two of the three share it."""
        return set(self.own[period].values()) == set(self.own[period + 1])

    def ends_alike(self, first: int, moved: Sequence[str], behind: Sequence[fx.Node]) -> bool:
        """Whether the last period goes on from the one before it as all from a first one on do, and
        nothing but it reads what that one makes.

        Args:
            moved: as in `alike`.
            behind: operators from the last period's first one on.
        """
        period = len(self.nodes) - 2
        last = self.nodes[-1] = list(behind[: len(self.nodes[period])])
        self.place |= {node: (period + 1, i) for i, node in enumerate(last)}
        if not self.alike(period, moved) or self._shares_trained(period + 1):
            return False
        near = self.reads_before(period + 1, first) and self.read_inside(period)
        return near and self.go_on(period)

    def _shares_trained(self, period: int) -> bool:
        """Whether what a period that was looked at shares with the one before it has a gradient:
        that is a sum, in which the last period has the first term, and all others add to it."""
        sources = {source for node in self.nodes[period] for source in node.all_input_nodes}
        shared = [
            node
            for node in sources
            if (self.place.get(node, (-1, 0))[0] < period - 1)
            and (node.op != "get_attr" or str(node.target) in self.shared)
        ]
        states = {str(node.target) for node in behind(*shared) if node.op == "get_attr"}
        owner = self.nodes[period][0].graph.owning_module
        params = {} if owner is None else dict(owner.named_parameters(remove_duplicate=False))
        return any(name in params and params[name].requires_grad for name in states)

    def _same(self, value: Any, other: Any, period: int, names: dict[str, str]) -> bool:
        if type(value) is not type(other):
            return False
        if isinstance(value, fx.Node):
            if value is other:
                if value.op == "get_attr":
                    self.shared.add(str(value.target))
                return self.place.get(value, (-1, 0))[0] < period
            if value.op == "get_attr":
                own, alike = str(value.target), other.op == "get_attr"
                same = alike and _looks(value) == _looks(other) and bool(_looks(value))
                return same and names.setdefault(own, str(other.target)) == str(other.target)
            at, there = self.place.get(value), self.place.get(other)
            if at is None or there is None or at[0] not in (period, period - 1):
                return False
            return there == (at[0] + 1, at[1])
        if isinstance(value, (list, tuple)):
            pairs = zip(value, other, strict=False)
            return len(value) == len(other) and all(
                self._same(a, b, period, names) for a, b in pairs
            )
        if isinstance(value, dict):
            return list(value) == list(other) and all(
                self._same(value[key], other[key], period, names) for key in value
            )
        return bool(value == other) and repr(value) == repr(other)  # -0.0

    def _writes_inside(self, node: fx.Node, period: int) -> bool:
        places = (self.place.get(each, (-2, 0))[0] for each in written(node))
        return all(place in (period, period - 1) for place in places)

    def read_inside(self, period: int) -> bool:
        """Whether nothing behind the next period reads what this one makes."""
        users = (user for node in self.nodes[period] for user in node.users)
        return all(self.place.get(user, (-2, 0))[0] in (period, period + 1) for user in users)

    def reads_before(self, period: int, first: int) -> bool:
        """Whether what a period shares with others is made before a first one."""
        for node in self.nodes[period]:
            for source in node.all_input_nodes:
                at = self.place.get(source, (-1, 0))[0]
                if first <= at < period - 1:
                    return False
        return True


def _looks(node: fx.Node) -> list[object]:
    """Of a node's value, what operators see of it; empty where there is none."""
    found = tensors(node.meta.get("val"))
    return [(*layout_of(each), each.requires_grad) for each in found]


def runs_of(graph: fx.Graph) -> list[Run]:
    """The longest run of each module with numbered children, none inside of another's."""
    operators = [node for node in graph.nodes if node.op == "call_function"]
    if any(_is_odd(node) for node in operators):
        return []
    first: dict[str, dict[int, int]] = {}
    for i, node in enumerate(operators):
        if (found := _NUMBERED.match(module_path(node))) is not None:
            first.setdefault(found[1] or "", {}).setdefault(int(found[2]), i)
    runs = (_run(container, starts, operators) for container, starts in first.items())
    return [run for run in runs if run is not None]


def _is_odd(node: fx.Node) -> bool:
    """Whether a graph with such a node is better left whole: sizes that are symbols, and
    submodules that run eagerly."""
    sizes = (n for each in tensors(node.meta.get("val")) for n in (*each.shape, *each.stride()))
    return is_region(node) or is_symbol(node.meta.get("val")) or any(map(is_symbol, sizes))


def _run(container: str, starts: Mapping[int, int], operators: Sequence[fx.Node]) -> Run | None:
    numbers, places = list(starts), list(starts.values())
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or places != sorted(places):
        return None
    for layers in range(1, LONGEST + 1):
        firsts = places[::layers]
        if len(firsts) < FEWEST:
            return None
        ends = [*firsts[1:], firsts[-1]]
        parts = [list(operators[a:b]) for a, b in zip(firsts, ends, strict=True)]
        found = _streak(_Pieces(parts), container, layers)
        if found is not None:
            pieces, (a, b) = found
            alone = b == len(parts) - 2 and pieces.ends_alike(
                a, _moved(pieces.nodes[b], container, layers), operators[firsts[-1] :]
            )
            states: list[Names] = []
            for period in range(a + 1, b + alone):
                last = states[-1] if states else {name: name for name in pieces.own[a + 1]}
                states.append({name: pieces.own[period][now] for name, now in last.items()})
            kept = numbers[0] + a * layers
            return Run(container, layers, kept, pieces.nodes[a : b - 1 + alone], states, alone)
    return None


def _streak(pieces: _Pieces, container: str, layers: int) -> tuple[_Pieces, tuple[int, int]] | None:
    """The first and the last of most periods that are alike."""
    best, first = (0, 0), 0
    for period in range(len(pieces.nodes) - 2):
        paths = _moved(pieces.nodes[period], container, layers)
        alike = pieces.nodes[period] and pieces.alike(period, paths)
        while alike and first < period and not pieces.reads_before(period + 1, first):
            first += 1
        if alike and first < period and not pieces.go_on(period):
            first = period
        if not alike or not pieces.read_inside(period):
            first = period + 1
        elif period + 1 - first > best[1] - best[0]:
            best = first, period + 1
    return (pieces, best) if best[1] - best[0] >= FEWEST - 3 else None


def _moved(nodes: Sequence[fx.Node], container: str, by: int) -> list[str]:
    """The paths of operators' modules so many layers further on."""
    return [moved(module_path(node), container, by) for node in nodes]


def moved(path: str, container: str, by: int) -> str:
    """The path of a module so many layers further on."""
    found = _NUMBERED.match(path)
    if found is None or (found[1] or "") != container:
        return path
    return f"{container}.{int(found[2]) + by}{path[found.end() :]}".removeprefix(".")


def shortened(graph: fx.Graph, runs: Sequence[Run]) -> fx.Graph:
    """The graph without the periods that are left out, and what only these read."""
    instead: dict[fx.Node, fx.Node] = {}
    gone: set[fx.Node] = set()
    for run in runs:
        gone.update(node for piece in run.pieces[1:] for node in piece)
        instead |= zip(run.pieces[-1], run.pieces[0], strict=True)
    made = fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in gone or (node.op == "get_attr" and node.users and gone.issuperset(node.users)):
            continue
        if node.op == "output":
            made.output(fx.node.map_arg(node.args[0], lambda n: twin[instead.get(n, n)]))
            continue
        twin[node] = made.node_copy(node, lambda n: twin[instead.get(n, n)])
    return made

"""What a unit keeps from its forward for its backward, and what it then computes again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from ..ir.graph import JointGraph, Phase, is_getitem, phase_of, root_bytes, storage_root, viewed
from ..ir.locality import Locality, backward_places
from .units import Unit

_KINDS = (
    ("attention", ("scaled_dot_product", "aten._softmax", "bmm", "_safe_softmax")),
    ("matmul", ("mm", "addmm", "convolution", "linear")),
    ("norm", ("norm", "rsqrt", "mean", "var")),
)


@dataclass(frozen=True)
class Stash:
    """One way to run a unit.

    Attributes:
        recomputed: forward nodes of the unit that its backward computes again.
        exclusive: values that it keeps and no other unit reads in its backward.
        shared: values that it keeps and others may keep too; made here or elsewhere.
        forgets: values made here that the backward of later units reads and that are computed
            again there, while those units are on the same stage.
        recompute_s: seconds of ``recomputed``.
        transient_bytes: the most that forward or backward hold beyond ``exclusive``.
    """

    recomputed: frozenset[fx.Node] = frozenset()
    exclusive: frozenset[fx.Node] = frozenset()
    shared: frozenset[fx.Node] = frozenset()
    forgets: frozenset[fx.Node] = frozenset()
    recompute_s: float = 0.0
    transient_bytes: int = 0

    @cached_property
    def stash_bytes(self) -> int:
        return root_bytes(self.exclusive)

    @cached_property
    def label(self) -> str:
        """What is recomputed, for people."""
        names = {_kind(node) for node in self.recomputed if _computes(node)}
        order = ("attention", "matmul", "norm", "elementwise")
        return ", ".join(name for name in order if name in names) or "nothing"


@dataclass(frozen=True)
class Body:
    """One unit with its backward.

    Attributes:
        forward, backward: nodes in execution order.
        abroad: forward values of this unit that the backward of another reads.
    """

    unit: Unit
    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    abroad: frozenset[fx.Node]


def bodies_of(
    graph: JointGraph, locality: Locality, units: Sequence[Unit]
) -> tuple[list[Body], dict[fx.Node, int]]:
    """The units with their backward nodes, and the unit of every staged node."""
    home = {node: unit.index for unit in units for node in unit.nodes}
    places = backward_places(graph, locality, home)
    backward: list[list[fx.Node]] = [[] for _ in units]
    abroad: list[set[fx.Node]] = [set() for _ in units]
    for node, place in places.items():
        if phase_of(node) is Phase.FORWARD:
            continue
        backward[place].append(node)
        for source in node.all_input_nodes:
            root = root_of(source, home)
            if root is not None and home[root] != place:
                abroad[home[root]].add(root)
    pairs = zip(units, backward, abroad, strict=True)
    bodies = [Body(u, u.nodes, tuple(b), frozenset(a)) for u, b, a in pairs]
    return bodies, places


def root_of(node: fx.Node, home: Mapping[fx.Node, int]) -> fx.Node | None:
    """The staged forward node whose memory a value is, None for others."""
    root = storage_root(node)
    return root if root in home and phase_of(root) is Phase.FORWARD else None


def _computes(node: fx.Node) -> bool:
    return not is_getitem(node) and viewed(node) is None


def _kind(node: fx.Node) -> str:
    name = str(node.target)
    return next((k for k, parts in _KINDS if any(p in name for p in parts)), "elementwise")

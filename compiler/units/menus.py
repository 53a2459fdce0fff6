"""Per unit, the ways to run it: from keeping everything to computing most of it again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import fx

from ..costs.hardware import Device
from ..ir.graph import Phase, describe, phase_of, storage_root, viewed
from .cutter import Cutter
from .stash import Body, Stash

MAX_FORGETFUL = 2


def options_of(
    bodies: Sequence[Body],
    places: dict[fx.Node, int],
    device: Device,
    remat: str = "auto",
    fuses: bool = False,
) -> list[tuple[Stash, ...]]:
    """Per unit the ways to run it: first the one that keeps most, then ever less.

    Args:
        remat: "auto" for all of them, "none" for the first, "full" for the one of least bytes.
        fuses: whether runs of operators are compiled; the first then keeps what is best for these,
            and not everything.
    """
    menus: list[tuple[Stash, ...]] = []
    found: dict[str, tuple[list[fx.Node], tuple[Stash, ...]]] = {}
    depth: dict[int, int] = {}
    for body in bodies:
        depth[body.unit.index] = _forgetful_depth(body, places, depth)
        forget = remat == "auto" and depth[body.unit.index] > 0
        nodes, key = _signature(body, places, forget)
        if key not in found:
            cut = Cutter(body, places, device)
            first = cut.keep_for_fusions() if fuses else cut.keep_all()
            menu = (first,) if remat == "none" else cut.menu(forget, first)
            found[key] = nodes, (menu[-1:] if remat == "full" else menu)
        like, menu = found[key]
        menus.append(tuple(_moved(stash, dict(zip(like, nodes, strict=True))) for stash in menu))
    for i in reversed(range(len(menus))):
        menus[i] = tuple(_with_readers(stash, menus, places) for stash in menus[i])
    return menus


def _forgetful_depth(body: Body, places: dict[fx.Node, int], depth: dict[int, int]) -> int:
    """How many units in a row would be computed again if this one forgot its outputs.

    0 if it may not forget them. At most `MAX_FORGETFUL`: a longer run would recompute a whole
    stage at once, and hold it.
    """
    index = body.unit.index
    if not body.abroad:
        return 0
    readers = {
        places[u] for node in _aliases(body.abroad, places) for u in node.users if u in places
    }
    sources = {places[a] for node in body.forward for a in node.all_input_nodes if a in places}
    row = 1 + max((depth[source] for source in sources - {index}), default=0)
    return row if min(readers) >= index and row <= MAX_FORGETFUL else 0


def _aliases(roots: Iterable[fx.Node], places: dict[fx.Node, int]) -> set[fx.Node]:
    """Values and the views of them."""
    found, pending = set(roots), list(roots)
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in places and viewed(user) is node and user not in found:
                found.add(user)
                pending.append(user)
    return found


# -- equal units ----------------------------------------------------------------------------------


def _signature(body: Body, places: dict[fx.Node, int], forget: bool) -> tuple[list[fx.Node], str]:
    """The unit's nodes and surroundings in order, and a text equal for units of equal structure."""
    index: dict[fx.Node, int] = {}
    own = set(body.forward) | set(body.backward)
    lines: list[str] = [str(forget)]

    def number(node: fx.Node) -> str:
        if node not in index:
            index[node] = len(index)
            if node not in own:
                staged = f"{phase_of(node)}" if node in places else node.op
                root = storage_root(node)
                memory = "" if root is node else number(root)
                lines.append(f"{index[node]} {staged} {describe(node)} {memory}")
        return f"%{index[node]}"

    for node in (*body.forward, *body.backward):
        args = fx.node.map_arg((node.args, node.kwargs), number)
        number(node)
        outside = any(user not in own for user in node.users)
        lines.append(
            f"{index[node]} {node.target} {args} {describe(node)} {outside} {node in body.abroad}"
        )
    return list(index), "\n".join(lines)


def _moved(stash: Stash, to: dict[fx.Node, fx.Node]) -> Stash:
    """The same choice for another unit of the same structure."""
    return replace(
        stash,
        recomputed=frozenset(map(to.__getitem__, stash.recomputed)),
        exclusive=frozenset(map(to.__getitem__, stash.exclusive)),
        shared=frozenset(map(to.__getitem__, stash.shared)),
        forgets=frozenset(map(to.__getitem__, stash.forgets)),
    )


def _with_readers(
    stash: Stash, menus: Sequence[tuple[Stash, ...]], places: dict[fx.Node, int]
) -> Stash:
    """A forgetful choice with what the backward of its readers holds at the same time."""
    if not stash.forgets:
        return stash
    users = {u for node in _aliases(stash.forgets, places) for u in node.users if u in places}
    readers = {places[u] for u in users if phase_of(u) is Phase.BACKWARD}
    most = max((o.transient_bytes for r in readers for o in menus[r]), default=0)
    return replace(stash, transient_bytes=stash.transient_bytes + most)

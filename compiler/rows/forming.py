"""The loss of a forward graph -> what it is made of, with the graph made ready to be weighed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..ir.errors import PipecompileError
from ..ir.graph import behind
from .coupling import coupled
from .fewer import Fewer
from .terms import Term, Way, terms_of
from .ways import Ways, alike, returned
from .weighing import UNWEIGHED, Weighed, weigh

WAY_OUT = (
    "microbatches=1 and dp=1 compute it over the whole batch, loss_weight= says what microbatches "
    'count, and loss_normalization="microbatch" takes their mean without this warning'
)


@dataclass(frozen=True)
class Formed:
    """What was found of a loss.

    Attributes:
        note, warning: as `LossForm` has them.
    """

    weighed: Weighed
    note: str
    warning: str


def formed(
    single: fx.GraphModule,
    more: Callable[[int], fx.GraphModule],
    names: Sequence[str],
    which: int = 0,
    cut: bool = False,
    fewer: Callable[[], tuple[Fewer, fx.GraphModule] | None] = lambda: None,
) -> Formed:
    """Tell a loss by its graph, which is rewritten in place.

    Args:
        more: the graph for so many times as many rows; for as many it is ``single``, or the same
            nodes with numbers where that has symbols.
        names: of the leaves of the batch.
        which: of the results is the loss.
        cut: a callable cuts batches, and not into rows.
        fewer: the graph without layers that are like others, and the same with twice the rows,
            which tell sooner; None where all layers are needed.
    """
    if not cut and (short := fewer()) is not None:
        graph, doubled = short
        ways = graph.ways(doubled)
        if ways is not None:
            return _told(single, ways, returned(graph.module)[which], graph.moved, names, cut)
    try:
        ways = Ways(more(1), more(2), cut)
        if not ways.how:  # models do other things with one row
            ways = Ways(more(2), more(4), cut)
    except (PipecompileError, ValueError) as error:
        return _unknown(f"twice the rows cannot be traced: {error}")
    loss = returned(ways.modules[0])[which] if ways.how else None
    moved = {} if loss is None else _moved(single, more(1), ways, loss, which)
    if loss is None or not moved:
        return _unknown("forward runs other operators with twice the rows")
    return _told(single, ways, loss, moved, names, cut)


def _told(
    single: fx.GraphModule,
    ways: Ways,
    loss: fx.Node,
    moved: Mapping[fx.Node, fx.Node],
    names: Sequence[str],
    cut: bool,
) -> Formed:
    """Args:
    loss: of the graph that was compared.
    moved: its nodes -> those of the graph that is rewritten.
    """
    where = coupled(ways, loss)
    terms = terms_of(ways, loss)
    try:
        weighed = weigh(single, [term.moved(moved) for term in terms])
    except KeyError:
        return _unknown("the loss is made by other operators with twice the rows")
    note = "; ".join(dict.fromkeys(_said(term, ways.modules[0], names) for term in terms))
    if where:
        return Formed(weighed, f"{note}; {where}", _couples(where))
    known = {term.way for term in terms} - {Way.SAME}
    if Way.OWN in known and (cut or not known & {Way.KEPT, Way.SUM}):
        why = next(term.why for term in terms if term.way is Way.OWN)
        return Formed(weighed, note, _untold(why))
    return Formed(weighed, note, "")


def _moved(
    single: fx.GraphModule, numbered: fx.GraphModule, ways: Ways, loss: fx.Node, which: int
) -> dict[fx.Node, fx.Node]:
    """Nodes behind the loss of what was compared -> those of the graph."""
    moved = alike(returned(numbered)[which], loss)
    if numbered is single:
        return moved
    named = {node.name: node for node in single.graph.nodes}
    return {theirs: named[mine.name] for theirs, mine in moved.items()}


def _unknown(why: str) -> Formed:
    return Formed(UNWEIGHED, f"the mean over microbatches: {why}", _untold(why))


def _untold(why: str) -> str:
    return (
        "how the loss of the batch follows from those of its microbatches cannot be told from "
        f"its graph ({why}): their mean is taken, which may be another loss than one device "
        f"computes for the whole batch; {WAY_OUT}"
    )


def _couples(where: str) -> str:
    return (
        f"{where}, and a microbatch has only some of the rows: loss and gradients are not those "
        f"that one device computes for the whole batch; {WAY_OUT}"
    )


def _said(term: Term, module: fx.GraphModule, names: Sequence[str]) -> str:
    if term.way is Way.KEPT:
        assert term.count is not None
        return f"a mean over what is kept of {_leaves(term.count.node, module, names)}"
    if term.way is Way.OWN:
        return f"a part of which each microbatch has its own, and their mean is taken ({term.why})"
    return {
        Way.ROWS: "a mean over rows" if term.size is None else "a mean over all that a piece has",
        Way.SUM: "a sum over rows, of all microbatches",
        Way.SAME: "a part that is no row's",
    }[term.way]


def _leaves(node: fx.Node, module: fx.GraphModule, names: Sequence[str]) -> str:
    """The leaves that a node is made of."""
    places, found = module.graph.find_nodes(op="placeholder"), set(behind(node))
    pairs = zip(names, places, strict=False)
    return " and ".join(repr(name) for name, place in pairs if place in found)

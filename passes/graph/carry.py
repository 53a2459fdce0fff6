"""Gradients add up inside regions in the order in which autograd adds them.

A value that is read outside a region and several times inside gets the sum of its gradients in the
order of these reads: what came from outside first, then one after another. A region that gave its
own sum would round otherwise; so it takes what was there, and goes on from that.
"""

from __future__ import annotations

from torch import fx

from ...compiler.ir.graph import JointGraph, is_getitem
from ...compiler.ir.locality import gradient_sums, is_gradient_sum
from ...compiler.ir.region import BACKWARD, is_region


def has_regions(graph: JointGraph) -> bool:
    return any(is_region(node) for node in graph.graph.nodes)


def carry_sums(graph: JointGraph) -> int:
    """Rewrite in place the sums that a region's gradient is added to; how many there were.

    Those that make the gradients of parameters stay, as their parts may be on several stages.
    """
    index = {node: i for i, node in enumerate(graph.graph.nodes)}
    whole = gradient_sums(graph)
    count = 0
    for node in [n for n in index if is_gradient_sum(n) and n not in whole]:
        before, grad = node.args
        assert isinstance(before, fx.Node)
        assert isinstance(grad, fx.Node)
        region = grad.args[0] if is_getitem(grad) else None
        if not isinstance(region, fx.Node) or str(region.target) != BACKWARD:
            continue
        if len(grad.users) > 1 or index[before] > index[region]:
            continue
        *first, carried, site = region.args
        place = grad.args[1]
        assert isinstance(carried, list)
        assert isinstance(place, int)
        if carried[place] is not None:
            continue
        region.args = (*first, [*carried[:place], before, *carried[place + 1 :]], site)
        grad.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(grad)
        graph.graph.erase_node(node)
        count += 1
    return count

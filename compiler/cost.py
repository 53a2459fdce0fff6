"""FLOPs, bytes and roofline seconds of a node.

FLOPs come from torch's own formulas (`torch.utils.flop_counter`). Seconds are the roofline of
Williams et al., CACM 52(4), 2009: the larger of FLOPs over peak and bytes over bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.utils.flop_counter import flop_registry

from .graph import is_getitem, nbytes, storage_root
from .hardware import Device


@dataclass(frozen=True)
class Cost:
    """What one node, or a sum of nodes, takes."""

    flops: int = 0
    moved_bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.moved_bytes + other.moved_bytes,
            self.seconds + other.seconds,
        )


def node_cost(node: fx.Node, device: Device) -> Cost:
    """The cost of one call; nothing for views, items and placeholders."""
    if node.op != "call_function" or is_getitem(node) or storage_root(node) is not node:
        return Cost()
    flops = node_flops(node)
    moved = nbytes(node) + sum(nbytes(source) for source in node.all_input_nodes)
    if str(node.target) == "aten.embedding.default":
        moved = 2 * nbytes(node)  # reads only the rows it returns
    seconds = max(flops / device.flops_per_s, moved / device.bytes_per_s) + device.launch_s
    return Cost(flops, moved, seconds)


def node_flops(node: fx.Node) -> int:
    """Floating-point operations, a multiply-add counted as two; 0 for ops without a formula."""
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0
    args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
    return int(formula(*args, **kwargs, out_val=node.meta["val"]))

"""FLOPs, bytes and roofline seconds of a node.

FLOPs come from torch's own formulas (`torch.utils.flop_counter`). Seconds are the roofline of
Williams et al., CACM 52(4), 2009: the larger of FLOPs over peak and bytes over bandwidth, where
the peak is that of the operands' dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils.flop_counter import flop_registry

from ..ir import ops
from ..ir.graph import is_getitem, nbytes, storage_root, tensors
from ..ir.region import Kernel
from ..ir.region import work_of as region_work
from ..tensors.facts import short_name
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


@dataclass(frozen=True)
class _Work:
    """What a node does on any device; valid while it has these arguments and this value."""

    args: tuple[Any, ...]
    value: Any
    flops: int
    moved_bytes: int
    dtype: str


def node_cost(node: fx.Node, device: Device) -> Cost:
    """The cost of one call; nothing for views, items and placeholders."""
    if node.op != "call_function":
        return Cost()
    if (region := region_work(node)) is not None:
        return sum((_cost(kernel, device) for kernel in region.kernels), Cost())
    return _cost(_work(node), device)


def _cost(work: _Work | Kernel, device: Device) -> Cost:
    """Of what one launch does."""
    if not work.moved_bytes and not work.flops:
        return Cost()
    compute_s = work.flops / device.peak(work.dtype) if work.flops else 0.0
    seconds = max(compute_s, work.moved_bytes / device.bytes_per_s) + device.launch_s
    return Cost(work.flops, work.moved_bytes, seconds)


def total_cost(nodes: Iterable[fx.Node], device: Device) -> Cost:
    """The cost of running nodes one after another."""
    return sum((node_cost(node, device) for node in nodes), Cost())


def node_flops(node: fx.Node) -> int:
    """Floating-point operations, a multiply-add counted as two; 0 for ops without a formula."""
    if (region := region_work(node)) is not None:
        return region.flops
    return _work(node).flops if node.op == "call_function" else 0


def _work(node: fx.Node) -> _Work:
    """Computed once per node and kept in its ``meta``: a compile asks for it several times."""
    known = node.meta.get("work")
    value = node.meta.get("val")
    if isinstance(known, _Work) and known.args is node.args and known.value is value:
        return known
    if is_getitem(node) or storage_root(node) is not node:
        work = _Work(node.args, value, 0, 0, "")
    else:
        sources = [t for n in node.all_input_nodes for t in tensors(n.meta.get("val"))]
        dtype = short_name(sources[0].dtype) if sources else ""
        work = _Work(node.args, value, _flops(node), _moved_bytes(node), dtype)
    node.meta["work"] = work
    return work


def _moved_bytes(node: fx.Node) -> int:
    read = sum(nbytes(source) for source in node.all_input_nodes)
    if str(node.target) == "aten.embedding.default":
        return 2 * nbytes(node)  # reads only the rows it returns
    if node.target is ops.accumulate:
        return 3 * read  # reads the gradient and its slot, writes the slot
    return nbytes(node) + read


def _flops(node: fx.Node) -> int:
    target: Any = node.target
    args = node.args
    if target is ops.seeded:
        target, args = args[2], args[3:]
    formula = flop_registry.get(getattr(target, "overloadpacket", None))
    if formula is None:
        return 0
    args, kwargs = fx.node.map_arg((args, node.kwargs), lambda n: n.meta["val"])
    return int(formula(*args, **kwargs, out_val=node.meta["val"]))

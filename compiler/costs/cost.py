"""FLOPs, bytes and roofline seconds of a node.

FLOPs are those of matrix products (`formulas.py`). Seconds are the roofline of Williams et al.,
CACM 52(4), 2009: the larger of FLOPs over peak and bytes over bandwidth, where the peak is that of
the operands' dtype.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir import ops
from ..ir.graph import is_getitem, nbytes, storage_root, tensors
from ..ir.region import Kernel
from ..tensors.facts import short_name
from .formulas import flops_of, lacking
from .hardware import Device
from .inside import inside

NOTICEABLE = 0.01
"""Of a step's seconds: what an operator without a formula could take at least to be named."""


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
    """What a node does on any device; valid while it has these arguments and this value.

    Attributes:
        lacks, times: as of a `Kernel`.
    """

    args: tuple[Any, ...]
    value: Any
    flops: int
    moved_bytes: int
    dtype: str
    lacks: str = ""
    times: int = 1


def node_cost(node: fx.Node, device: Device) -> Cost:
    """The cost of one call; nothing for views, items and placeholders."""
    if node.op != "call_function":
        return Cost()
    if (work := inside(node)) is not None:
        return sum((_cost(kernel, device) for kernel in work.kernels), Cost())
    return _cost(_work(node), device)


def _cost(work: _Work | Kernel, device: Device) -> Cost:
    """Of what one launch does, or several that are alike."""
    if not work.moved_bytes and not work.flops:
        return Cost()
    compute_s = work.flops / device.peak(work.dtype) if work.flops else 0.0
    seconds = max(compute_s, work.moved_bytes / device.bytes_per_s) + device.launch_s
    times = work.times
    return Cost(work.flops * times, work.moved_bytes * times, seconds * times)


def total_cost(nodes: Iterable[fx.Node], device: Device) -> Cost:
    """The cost of running nodes one after another."""
    return sum((node_cost(node, device) for node in nodes), Cost())


def node_flops(node: fx.Node) -> int:
    """Floating-point operations, a multiply-add counted as two; 0 of ops without products."""
    if (work := inside(node)) is not None:
        return work.flops
    return _work(node).flops if node.op == "call_function" else 0


def unpriced(nodes: Iterable[fx.Node], device: Device) -> str:
    """A note on operators that have no formula and may hold products; "" where there are none.

    How much they multiply is not known. Named are those that would take a share of the step that
    can be noticed if all that they read and make were matrices that are multiplied: the 3 n²
    elements of two operands and their product stand for 2 n³ FLOPs.
    """
    calls: Counter[str] = Counter()
    most_s: dict[str, float] = defaultdict(float)
    total_s = 0.0
    for work in _launches(nodes):
        total_s += _cost(work, device).seconds
        if work.lacks:
            elements = work.moved_bytes / (getattr(torch, work.dtype).itemsize if work.dtype else 4)
            calls[work.lacks] += 1
            most_s[work.lacks] += 2 * (elements / 3) ** 1.5 / device.peak(work.dtype)
    large = sorted(name for name in calls if most_s[name] > NOTICEABLE * total_s)
    found = [f"{name} ({calls[name]} ×)" for name in large]
    if not found:
        return ""
    return (
        f"no formula for {', '.join(found)}: counted as memory traffic; "
        "torch.utils.flop_counter.register_flop_formula adds one"
    )


def _launches(nodes: Iterable[fx.Node]) -> Iterator[_Work | Kernel]:
    """All that nodes run."""
    for node in nodes:
        if (work := inside(node)) is not None:
            yield from work.kernels
        elif node.op == "call_function":
            yield _work(node)


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
        work = _Work(
            node.args, value, _flops(node), _moved_bytes(node), dtype, lacking(_called(node)[0])
        )
    node.meta["work"] = work
    return work


def _moved_bytes(node: fx.Node) -> int:
    read = sum(nbytes(source) for source in node.all_input_nodes)
    if str(node.target) == "aten.embedding.default":
        return 2 * nbytes(node)  # reads only the rows it returns
    if node.target is ops.accumulate:
        return 3 * read  # reads the gradient and its slot, writes the slot
    return nbytes(node) + read


def _called(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """The operator that a node calls, and its operands."""
    if node.target is ops.seeded:
        return node.args[2], node.args[3:]
    return node.target, node.args


def _flops(node: fx.Node) -> int:
    target, args = _called(node)
    args, kwargs = fx.node.map_arg((args, node.kwargs), lambda n: n.meta.get("val"))
    return flops_of(target, args, kwargs, node.meta.get("val")) or 0

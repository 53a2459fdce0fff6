"""FLOPs, bytes and seconds of a node.

FLOPs are those of matrix products (`formulas.py`); seconds are a device's (`Device.kernel_s`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...passes.programs.fusions import is_fusable
from ..calibration.forms import Form
from ..calibration.operators import form_of
from ..ir import ops
from ..ir.graph import is_getitem, nbytes, storage_root, tensors
from ..ir.region import Kernel
from ..memory.inside import inside
from ..tensors.facts import short_name
from .formulas import flops_of, lacking
from .fused import fused_bytes
from .hardware import Device
from .told_pieces import told_pieces

NOTICEABLE = 0.01
"""Of a step's seconds: what an operator without a formula could take at least to be named."""


@dataclass(frozen=True)
class Cost:
    """What one node, or a sum of nodes, takes."""

    flops: int = 0
    moved_bytes: int = 0
    seconds: float = 0.0
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.moved_bytes + other.moved_bytes,
            self.seconds + other.seconds,
            self.launches + other.launches,
        )


@dataclass(frozen=True)
class _Work:
    """What a node does on any device; valid while it has these arguments and this value, and for
    one that calls the same operator on the same values in a copy of the graph.

    Attributes:
        inputs: how many nodes are among the arguments.
        lacks, times, form: as of a `Kernel`.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: int
    value: Any
    flops: int
    moved_bytes: int
    dtype: str
    lacks: str = ""
    times: int = 1
    form: Form | None = None

    def is_of(self, node: fx.Node) -> bool:
        if self.value is not node.meta.get("val"):
            return False
        if self.args is node.args:
            return True
        same = self.target is node.target and self.inputs == len(node.all_input_nodes)
        return same and _same(self.args, node.args) and _same(self.kwargs, node.kwargs)


def _same(one: Any, other: Any) -> bool:
    """Whether operands are the same values, whichever nodes have them."""
    if isinstance(one, fx.Node):
        return isinstance(other, fx.Node) and one.meta.get("val") is other.meta.get("val")
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def node_cost(node: fx.Node, device: Device) -> Cost:
    """The cost of one call; nothing for views, items and placeholders."""
    if node.op != "call_function":
        return Cost()
    if (work := inside(node)) is not None:
        return sum((_cost(kernel, device) for kernel in work.kernels), Cost())
    if _in_fusion(node, device):
        return _fused(node, device)
    return _cost(_work(node), device)


def _in_fusion(node: fx.Node, device: Device) -> bool:
    return device.table is not None and device.table.fused and is_fusable(node)


def _fused(node: fx.Node, device: Device) -> Cost:
    """As a part of a fusion, which is one launch for each result that leaves it."""
    read, written = fused_bytes(node)
    moved = _work(node).moved_bytes
    if not moved:
        return Cost()
    launches = int(written > 0)
    started_s = device.kernel_s(0, 0, "") * launches
    return Cost(0, moved, device.moved_s(min(moved, read + written)) + started_s, launches)


def _cost(work: _Work | Kernel, device: Device) -> Cost:
    """Of what one launch does, or several that are alike."""
    if not work.moved_bytes and not work.flops:
        return Cost()
    seconds = device.kernel_s(work.flops, work.moved_bytes, work.dtype, work.form)
    times = work.times
    return Cost(work.flops * times, work.moved_bytes * times, seconds * times, times)


def least_seconds(node: fx.Node, device: Device) -> float:
    """Of one call, if its products ran at the best rate of the device, its bytes at the full
    bandwidth, and launching took no time: in proportion to what is computed and moved."""
    if node.op != "call_function":
        return 0.0
    found = inside(node)
    if found is None and _in_fusion(node, device):
        return min(_work(node).moved_bytes, sum(fused_bytes(node))) / device.bytes_per_s
    works = [_work(node)] if found is None else found.kernels
    return sum(
        each.times * device.least_s(each.flops, each.moved_bytes, each.dtype, each.form)
        for each in works
    )


def total_cost(nodes: Iterable[fx.Node], device: Device) -> Cost:
    """The cost of running nodes one after another."""
    return sum((node_cost(node, device) for node in nodes), Cost())


def node_flops(node: fx.Node) -> int:
    """Floating-point operations, a multiply-add counted as two; 0 of ops without products."""
    if (work := inside(node)) is not None:
        return work.flops
    return _work(node).flops if node.op == "call_function" else 0


def notes_on_costs(
    nodes: Sequence[fx.Node], device: Device, measures: bool
) -> Iterator[tuple[str, str]]:
    """(name, note) of all that a plan says of where its seconds come from.

    Args:
        measures: programs are timed, so that no rate of the device counts.
    """
    if note := told_pieces(nodes, device):
        yield "chunked_loss", note
    if not measures:
        if note := unpriced(nodes, device):
            yield "costs", note
        if device.table is not None:
            yield "calibration", device.table.told


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
    """Computed once per node and kept in its ``meta``, which its copies have too: a compile asks
    for it several times, of many copies of a graph."""
    known = node.meta.get("work")
    if isinstance(known, _Work) and known.is_of(node):
        if known.args is not node.args:  # nothing keeps another graph's nodes
            known = node.meta["work"] = replace(known, args=node.args, kwargs=node.kwargs)
        return known
    own = node.target, node.args, node.kwargs, len(node.all_input_nodes)
    if is_getitem(node) or storage_root(node) is not node:
        work = _Work(*own, node.meta.get("val"), 0, 0, "")
    else:
        sources = [t for n in node.all_input_nodes for t in tensors(n.meta.get("val"))]
        dtype = short_name(sources[0].dtype) if sources else ""
        flops, form = _products(node)
        lacks = lacking(_called(node)[0])
        moved = _moved_bytes(node)
        work = _Work(*own, node.meta.get("val"), flops, moved, dtype, lacks, form=form)
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


def _products(node: fx.Node) -> tuple[int, Form | None]:
    """FLOPs, and the shape of the products that they are of."""
    target, args = _called(node)
    args, kwargs = fx.node.map_arg((args, node.kwargs), lambda n: n.meta.get("val"))
    flops = flops_of(target, args, kwargs, node.meta.get("val")) or 0
    return flops, form_of(target, args, kwargs) if flops else None

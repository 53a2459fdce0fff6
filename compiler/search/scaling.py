"""What microbatches of other sizes take at least, from the graph of one size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..costs.cost import least_seconds, node_flops
from ..costs.hardware import Device
from ..ir.graph import JointGraph


def least_row_s(graph: JointGraph, rows: int, device: Device) -> float:
    """Seconds of a row, whatever the number of rows that it is computed with.

    Products count by their FLOPs at the best rate that the device has, which are in proportion to
    the rows. Other operators count by their bytes, where their result does not have the shape of a
    parameter, such as a cast of its gradient, which takes as long for any number of rows.

    Args:
        rows: of the graph.
    """
    fixed = {tuple(sorted(node.meta["val"].shape)) for node in graph.params.values()}
    scaled = (n for n in graph.ops() if node_flops(n) or not fixed.intersection(_shapes(n)))
    return sum(least_seconds(node, device) for node in scaled) / rows


def _shapes(node: fx.Node) -> Iterable[tuple[int, ...]]:
    value = node.meta.get("val")
    values: Iterable[Any] = value if isinstance(value, (tuple, list)) else [value]
    return [tuple(sorted(each.shape)) for each in values if isinstance(each, torch.Tensor)]

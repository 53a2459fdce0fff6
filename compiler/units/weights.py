"""What of a unit's backward no other unit waits for: most gradients of weights.

Where the backward of stages is split (`passes.programs.lower`), this is W on any stage but one
that sends no gradients on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..costs.cost import node_cost
from ..costs.hardware import Device
from ..ir.graph import root_bytes
from ..ir.locality import awaited
from .stash import Body


@dataclass(frozen=True)
class WeightWork:
    """W of one unit.

    Attributes:
        part: of the seconds of its backward.
        carry_bytes: of what it reads, made by the unit's forward and the rest of its backward; held
            until it has run.
    """

    part: float
    carry_bytes: int


def weight_works(
    bodies: Sequence[Body], places: Mapping[fx.Node, int], device: Device
) -> list[WeightWork]:
    """Of each unit, at a device's peak rates.

    Args:
        places: the unit of every staged node.
    """
    urgent = awaited([node for body in bodies for node in body.backward], places)
    return [_work(body, urgent, device) for body in bodies]


def _work(body: Body, urgent: Collection[fx.Node], device: Device) -> WeightWork:
    seconds = {node: node_cost(node, device).seconds for node in body.backward}
    mine = [node for node in body.backward if node not in urgent]
    whole = math.fsum(seconds.values())
    part = math.fsum(seconds[node] for node in mine) / whole if whole else 0.0
    made = {*body.forward, *body.backward}.difference(mine)
    return WeightWork(
        part, root_bytes(a for node in mine for a in node.all_input_nodes if a in made)
    )

"""What of a unit's backward no other unit waits for: most gradients of weights.

Where the backward of stages is split (`passes.programs.lower`), this is W on any stage but one
that sends no gradients on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from ..costs.cost import node_cost
from ..costs.hardware import Device
from ..ir.graph import root_bytes
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


def weight_work(body: Body, device: Device) -> WeightWork:
    """Of a unit, at a device's peak rates."""
    backward = set(body.backward)
    urgent: set[fx.Node] = set()
    for node in reversed(body.backward):
        if any(
            user in urgent or user not in backward for user in node.users if user.op != "output"
        ):
            urgent.add(node)
    mine = [node for node in body.backward if node not in urgent]
    whole = math.fsum(node_cost(node, device).seconds for node in body.backward)
    part = math.fsum(node_cost(node, device).seconds for node in mine) / whole if whole else 0.0
    made = urgent.union(body.forward)
    return WeightWork(
        part, root_bytes(a for node in mine for a in node.all_input_nodes if a in made)
    )

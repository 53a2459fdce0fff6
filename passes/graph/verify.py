"""What is legal for a joint graph and for its placement, checked after every pass."""

from __future__ import annotations

import torch
from torch import fx

from ...compiler.ir.errors import VerificationError
from ...compiler.ir.graph import JointGraph, Phase, phase_of
from ...compiler.ir.precision import REDUCED


def verify_graph(graph: JointGraph) -> None:
    """Raises VerificationError where a joint graph breaks the table in `compiler.ir.graph`."""
    graph.graph.lint()
    for node in graph.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            raise VerificationError(f"{node} is a {node.op}")
        if node.op == "get_attr" and not hasattr(graph.constants, str(node.target)):
            raise VerificationError(f"{node} is no constant of the graph")
        if node.op == "call_function" and "val" not in node.meta:
            raise VerificationError(f"{node} has no shape")
        reads_backward = [a for a in node.all_input_nodes if phase_of(a) is Phase.BACKWARD]
        if node.op != "output" and phase_of(node) is Phase.FORWARD and reads_backward:
            raise VerificationError(f"the forward node {node} reads {reads_backward[0]}")
    for name, grad in graph.grads.items():
        param, found = graph.params[name].meta["val"], grad.meta["val"]
        wide = param.dtype in (torch.float32, torch.float64)
        narrow = wide and found.dtype in REDUCED  # widened by its sum
        if param.shape != found.shape or not (param.dtype is found.dtype or narrow):
            raise VerificationError(f"the gradient of {name} is {found.shape}, {found.dtype}")


def verify_placement(graph: JointGraph, stage: dict[fx.Node, int]) -> None:
    """Forward edges go up the stages, backward edges down."""
    for node, here in stage.items():
        for source in node.all_input_nodes:
            if source not in stage or phase_of(source) is not phase_of(node):
                continue
            rising = phase_of(node) is Phase.FORWARD
            if stage[source] > here if rising else stage[source] < here:
                raise VerificationError(
                    f"{source} (stage {stage[source]}) is read by {node} (stage {here})"
                )

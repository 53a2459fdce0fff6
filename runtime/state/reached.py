"""Parameters that a step's gradients may not reach: experts of a region, say, without a token.

Autograd leaves their ``.grad`` None, and optimizers leave them alone. A region's backward gives
zeros in that place, and marks them; whether there was anything else is noted while they add up.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from ...compiler.ir import ops
from ...compiler.ir.graph import is_getitem
from ...compiler.ir.program import PipelineProgram, Port, Program, Role
from ...compiler.ir.region import is_not_reached, work_of


def reached_by_data(program: PipelineProgram) -> frozenset[str]:
    """The parameters of regions; none where the program has no region."""
    parts = [part for stage in program.stages for part in stage.parts.values()]
    if not any(work_of(node) for part in parts for node in part.module.graph.nodes):
        return frozenset()
    return frozenset(name for part in parts for name in _of_program(part))


def _of_program(program: Program) -> Iterable[str]:
    placeholders = program.module.graph.find_nodes(op="placeholder")
    ports = dict(zip(placeholders, program.inputs, strict=True))
    for node in program.module.graph.find_nodes(op="call_function", target=ops.accumulate):
        slot, grad = node.args
        if _of_region(grad, ports):
            yield str(ports[slot].key)


def _of_region(grad: fx.Node, ports: dict[fx.Node, Port]) -> bool:
    """Whether a region has made a gradient; where another program made it, nobody can tell."""
    source = grad.args[0] if is_getitem(grad) else grad
    assert isinstance(source, fx.Node)
    port = ports.get(source)
    return work_of(source) is not None if port is None else port.role is Role.VALUE


class Reached:
    """Of one rank, the parameters of regions that gradients have reached since `restart`."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def restart(self) -> None:
        self.names.clear()

    def watched(self, name: str, inlet: ops.Slot) -> ops.Slot:
        """A slot that notes what is added to it."""
        return _Watched(self.names, name, inlet)


class _Watched(ops.Slot):
    def __init__(self, names: set[str], name: str, inlet: ops.Slot):
        self._names, self._name, self._inlet = names, name, inlet

    def add(self, grad: torch.Tensor) -> None:
        if not is_not_reached(grad):
            self._names.add(self._name)
        self._inlet.add(grad)

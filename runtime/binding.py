"""The programs of a stage with the arguments that never change already in place."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from ..compiler.ir.actions import Kind
from ..compiler.ir.program import Port, Program, Role, StageProgram, fusions_of
from .exchange.parcels import GatheredGroup, LocalGroup
from .kernels.kernels import with_kernels
from .kernels.rounding import Kernels, adding, kernels_now
from .state.rank_state import RankState


@dataclass(frozen=True)
class Bound:
    """A program and its arguments: those that are fixed, and where the others go.

    Attributes:
        fixed: one per argument; None for those of a microbatch.
        values, batch: (position, name) and (position, batch leaf) of these.
        seed, tangent: the positions of the seed of random ops, and of the tangent of the loss, if
            there is one.
        drops: the values that nothing needs once the program has started.
    """

    program: Program
    fixed: list[Any]
    values: tuple[tuple[int, str], ...]
    batch: tuple[tuple[int, int], ...]
    seed: int | None
    tangent: int | None
    drops: tuple[str, ...]

    @cached_property
    def inputs(self) -> list[tuple[int, Hashable]]:
        """Positions of the tensors that differ between microbatches, each with a name for it."""
        tangents = [] if self.tangent is None else [(self.tangent, Role.TANGENT)]
        leaves = [(position, (Role.BATCH, leaf)) for position, leaf in self.batch]
        return [*self.values, *leaves, *tangents]

    @cached_property
    def results(self) -> tuple[tuple[Role, str], ...]:
        """Per result, what it is and the name of that."""
        return tuple((port.role, str(port.key)) for port in self.program.outputs)


class BoundStage:
    """One stage's programs on the rank that holds it.

    Args:
        by_data: the parameters that gradients may not reach.

    Attributes:
        parts: the programs that a microbatch runs.
        updates: whether its forward changes buffers.
    """

    def __init__(
        self,
        code: StageProgram,
        state: RankState,
        by_data: Collection[str] = (),
    ):
        self.code, self._state, self._by_data = code, state, by_data
        for program in (code.constants, *code.parts.values()):
            for module in (program.module, *fusions_of(program).values()):
                _retarget(module, state.device)
        code.constants.prepare()
        self._programs, self._kernels = self._running()
        self._groups = self._grouped()
        forward = code.parts.get(Kind.F)
        self.updates = forward is not None and any(p.role is Role.BUFFER for p in forward.outputs)
        self.parts: dict[Kind, Bound] = {}
        self.refresh()

    @property
    def draws(self) -> bool:
        """Whether a program has random ops."""
        return any(bound.seed is not None for bound in self.parts.values())

    def settle(self) -> None:
        """Before a run: how kernels round may depend on how many threads they have, say."""
        if self._state.device.type == "cpu" and self._kernels != kernels_now():
            self._programs, self._kernels = self._running()
            self.refresh()

    @torch.no_grad()
    def _running(self) -> tuple[dict[Kind, Program], Kernels]:
        """The programs as they run, and what they were made for."""
        device, inlets = self._state.device, self._state.grads.inlets
        slots = {name: slot for name, slot in inlets.items() if name not in self._by_data}
        made = {
            kind: adding(with_kernels(program, device), slots, device)
            for kind, program in self.code.parts.items()
        }
        for program in made.values():
            program.prepare()
        return made, kernels_now()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the constants anew and bind them: at first, and after buffers were loaded."""
        constants = self.code.constants
        arguments = [self._state.buffers[str(port.key)] for port in constants.inputs]
        made = constants.module.forward(arguments)
        values = dict(zip((p.key for p in constants.outputs), made, strict=True))
        self.parts = {
            kind: self._bind(program, values, kind) for kind, program in self._programs.items()
        }

    def _grouped(self) -> Sequence[GatheredGroup | LocalGroup]:
        if self._state.shards is not None:
            return self._state.shards.groups(self.code)
        dp = self._state.endpoint.dp
        return [
            LocalGroup({port: self._fixed(port, {}) for port in group}, dp, self._state.owners)
            for group in self.code.groups
        ]

    def _bind(self, program: Program, constants: dict[Any, torch.Tensor], kind: Kind) -> Bound:
        fixed = [self._fixed(port, constants) for port in program.inputs]
        at = [(i, port) for i, port in enumerate(program.inputs)]
        seeds = [i for i, port in at if port.role is Role.SEED]
        tangents = [i for i, port in at if port.role is Role.TANGENT]
        return Bound(
            program,
            fixed,
            tuple((i, str(port.key)) for i, port in at if port.role is Role.VALUE),
            tuple((i, int(port.key)) for i, port in at if port.role is Role.BATCH),
            seeds[0] if seeds else None,
            tangents[0] if tangents else None,
            self.code.drops.get((kind, -1), ()),
        )

    def _fixed(self, port: Port, constants: dict[Any, torch.Tensor]) -> Any:
        state, name = self._state, str(port.key)
        if port.role is Role.PARAM:
            return state.params[name]
        if port.role is Role.COPY:
            return state.copies[name]
        if port.role is Role.BUFFER:
            return state.buffers[name]
        if port.role is Role.CONSTANT:
            return constants[port.key]
        if port.role is Role.SLOT:
            inlet = state.grads.inlets[name]
            return state.reached.watched(name, inlet) if name in self._by_data else inlet
        if port.role is Role.GROUP:
            return self._groups[int(port.key)]
        return None


def _retarget(module: fx.GraphModule, device: torch.device) -> None:
    """Make a program's own tensors on this rank's device: it was traced for the type alone."""
    changed = False
    for node in module.graph.nodes:
        wanted = node.kwargs.get("device")
        if isinstance(wanted, torch.device) and wanted.type == device.type and wanted != device:
            node.kwargs = {**node.kwargs, "device": device}
            changed = True
    for name, tensor in list(module.named_buffers()):
        if tensor.device.type == device.type and tensor.device != device:
            setattr(module, name, tensor.to(device))
    if changed:
        module.recompile()

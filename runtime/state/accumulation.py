"""Gradients between the slots, in which runs add them up, and ``.grad`` of the parameters."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from ...compiler.ir.shards import rows_of
from ...compiler.tensors.norms import own_powers
from .bucket import GradSlot
from .model_state import ModelState


class Accumulation:
    """What the user, or the runs before, left in ``.grad``, and what a run adds to it."""

    def __init__(self, state: ModelState):
        self._state = state
        self._before: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def open(self, scale: float = 1.0) -> None:
        """Before a run: slots take up whatever the user left in ``.grad``; None clears them.

        Of a gradient that leaves once per step it is kept aside, as each replica has its own rows
        of it, and added afterwards; so it is where gradients are compressed, as it has been
        exchanged already.

        Args:
            scale: of the loss in this run.
        """
        every = self._state.zero.closes or bool(self._state.compressed)
        aside = self._keep(every)
        if every:
            return
        for rank, state in self._state.ranks.items():
            for name, slot in state.grads.slots.items() if state.grads.leads else ():
                if name in aside:
                    continue
                first, param = self._state.primary.get(name, (rank, None))
                slot.fresh = param is None or param.grad is None
                if param is None or param.grad is None:
                    continue
                if slot.owned.dtype is not param.dtype:
                    slot.tensor.copy_(param.grad * scale)
                    continue
                if param.grad is not slot.owned:
                    slot.tensor.copy_(param.grad)
                if rank == first:
                    param.grad = slot.tensor
        for name, (rank, param) in self._state.primary.items():
            own = self._state.ranks[rank].grads.slots.get(name)
            if own is not None and own.tensor.dtype is not param.dtype:
                param.grad = None  # the slot has it
        if scale != 1.0:
            for state in self._state.ranks.values():
                if state.grads.leads:
                    state.grads.scale(scale)

    def _keep(self, every: bool) -> set[str]:
        """Keep aside what parameters have; returns their names.

        Args:
            every: of all, and not of those alone whose gradients leave once per step.
        """
        aside: set[str] = set()
        for state in self._state.ranks.values():
            for name, slot in state.grads.slots.items():
                if every or slot.closes:
                    slot.fresh = True
                    aside.add(name)
        for name, param in self._state.named_parameters():
            if (every or name in aside) and param.grad is not None:
                self._before[name] = param.grad.clone()
                param.grad = None
        return aside

    def blank(self, names: Collection[str]) -> list[tuple[str, GradSlot]]:
        """The slots of these parameters that have no gradient yet."""
        slots = (each for s in self._state.ranks.values() for each in s.grads.slots.items())
        return [(name, slot) for name, slot in slots if name in names and slot.fresh]

    def unscale(self, scale: float) -> bool:
        """Undo the scaling of the loss; narrow sums are widened first, when they are shown.
        Whether all gradients of this process are finite."""
        ranks = self._state.ranks.values()
        finite = all(state.grads.is_finite() for state in ranks)
        for state in ranks:
            if state.grads.leads:
                state.grads.scale(1 / scale)
        return finite

    def close(self, scale: float = 1.0) -> None:
        """After a run: every parameter that got a gradient shows it as ``.grad``."""
        for name, (rank, param) in self._state.primary.items():
            slot = self._state.ranks[rank].grads.slots.get(name)
            if slot is not None and not slot.fresh:
                _show(param, slot, scale)
            before = self._before.pop(name, None)
            if before is not None:
                param.grad = before if param.grad is None else param.grad.add_(before)

    def drop(self) -> None:
        """As if there had been none, so that no optimizer's step changes anything."""
        self._before.clear()
        for state in self._state.ranks.values():
            state.grads.clear()
        for _, param in self._state.named_parameters():
            param.grad = None


def _show(param: nn.Parameter, slot: GradSlot, scale: float) -> None:
    """torch wants a gradient in its parameter's dtype."""
    same = slot.owned.dtype is param.dtype
    param.grad = slot.owned if same else slot.owned.to(param.dtype).div_(scale)


def reported(state: ModelState) -> dict[str, torch.Tensor]:
    """The gradients that this process reports to the global norm: each once over all stages."""
    return {
        name: param.grad
        for name, param in state.named_parameters()
        if param.grad is not None and state.is_ours(name)
    }


def reported_powers(state: ModelState, kind: float) -> dict[str, dict[int, float]]:
    """Name -> replica -> what its rows have of the norm, of those to be reported here."""
    found: dict[str, dict[int, float]] = {}
    for name, (rank, param) in state.primary.items():
        first = state.mesh.replicas_of(state.homes[name][0])
        if param.grad is None or not state.ranks.keys() & set(first):
            continue
        replica = state.mesh.replica_of(rank)
        if not state.has_rows(name):
            found[name] = dict(enumerate(powers(param.grad, state.mesh.dp, kind)))
        elif param.grad.dim() or replica == 0:
            found[name] = {replica: own_powers(param.grad, kind)}
    return found


def powers(grad: torch.Tensor, dp: int, kind: float) -> list[float]:
    """Per replica what its rows have of a norm, in fp64.

    They are the same numbers whether one process has all rows or each has its own.
    """
    if not grad.dim():
        return [own_powers(grad, kind)]
    return [own_powers(rows_of(grad, dp, replica), kind) for replica in range(dp)]

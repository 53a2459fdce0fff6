"""Gradients of a rank as the rows of one matrix, in which each parameter begins a row of its own.

So what becomes of a parameter does not depend on its neighbours: stages that share a weight make
the same bits of it, whatever else they have.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...compiler.compression.sizes import chunks


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order of its memory, (elements,); a view."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


class Packing:
    """Where each parameter's elements are among the rows.

    Args:
        grads: FQN -> its gradient, whose form and memory's order the parameter has.

    Attributes:
        spans: FQN -> (first row, rows).
        rows: of all.
    """

    def __init__(self, grads: Mapping[str, torch.Tensor], width: int):
        self._grads, self.width = grads, width
        self.spans: dict[str, tuple[int, int]] = {}
        self.rows = 0
        for name, grad in grads.items():
            count = chunks(grad.numel(), width)
            self.spans[name] = self.rows, count
            self.rows += count

    def zeros(self) -> torch.Tensor:
        """(rows, width)."""
        like = next(iter(self._grads.values()))
        return torch.zeros(self.rows, self.width, dtype=like.dtype, device=like.device)

    def elements(self, packed: torch.Tensor, name: str) -> torch.Tensor:
        """A parameter's own among the rows, (elements,); a view."""
        start = self.spans[name][0] * self.width
        return packed.view(-1)[start : start + self._grads[name].numel()]

    def shaped(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """FQN -> its elements in its form; views."""
        found = {}
        for name, grad in self._grads.items():
            own = self.elements(packed, name)
            found[name] = own.as_strided(grad.shape, grad.stride(), own.storage_offset())
        return found

    def add_(self, packed: torch.Tensor, factor: float) -> None:
        """Add the gradients, multiplied."""
        for name, grad in self._grads.items():
            self.elements(packed, name).add_(flat(grad), alpha=factor)

    def write(self, packed: torch.Tensor, factor: float) -> None:
        """The gradients become what stands in the rows, multiplied."""
        for name, grad in self._grads.items():
            torch.mul(self.elements(packed, name), factor, out=flat(grad))

    def owned(self, dp: int, replica: int) -> torch.Tensor:
        """Numbers of the rows whose means a replica makes, (rows,): of each parameter every
        ``dp``-th."""
        device = next(iter(self._grads.values())).device
        parts = [torch.arange(at, at + n)[replica::dp] for at, n in self.spans.values()]
        return torch.cat(parts).to(device)


class Kept:
    """What a method keeps that compresses gradients as rows, as `compressed.Compressor` has it.

    Args:
        width: how many numbers a row has.
        grads: FQN -> where its gradient is, in fp32.

    Attributes:
        residues: FQN -> what was not sent, in the parameter's form.
        bases: what all replicas have alike: nothing.
        held: the tensors that all of that lies in.
    """

    def __init__(self, width: int, grads: Mapping[str, torch.Tensor]):
        self._grads, self._packing = grads, Packing(grads, width)
        self._kept = self._packing.zeros()
        self.residues = self._packing.shaped(self._kept)
        self.bases: dict[str, torch.Tensor] = {}
        self.held = [self._kept]

"""What the model returned for a batch, in pieces: one per microbatch, of the replicas at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...compiler.ir.errors import BatchError
from ...compiler.rows.loss import Weights, loss_of_outputs
from ...compiler.rows.outputs import Output, joined
from ...compiler.rows.ways import How

Pieces = Mapping[int, Sequence[Mapping[int, torch.Tensor]]]
"""Replica -> per microbatch, what the model returned, by its position."""


@dataclass(frozen=True)
class Part:
    """Of one batch.

    Attributes:
        outputs: per result, how those of microbatches are joined.
        rebuild: puts the results back into the structure that the model returns.
        sizes: replica -> the rows of each microbatch, of all replicas that are joined.
        weights: of the loss among the results, for the microbatches of these.
        pieces: of the replicas that this process has the results of; of none where it holds no
            last stage.
    """

    outputs: Sequence[Output]
    rebuild: Callable[[list[torch.Tensor]], Any] = field(repr=False)
    sizes: Mapping[int, Sequence[int]]
    weights: Weights
    pieces: Pieces

    def on_cpu(self) -> Part:
        """With results that can be sent: each in memory of its own."""
        moved = {
            replica: [{i: own(value) for i, value in piece.items()} for piece in pieces]
            for replica, pieces in self.pieces.items()
        }
        return replace(self, pieces=moved)

    def of(self, everyone: Sequence[Pieces]) -> Part:
        """With the results that every process has."""
        pieces = {r: each for theirs in everyone for r, each in theirs.items()}
        return replace(self, pieces=pieces)

    @property
    def has_rows(self) -> bool:
        """Whether this process has results of any."""
        return any(sum(self.sizes[replica]) for replica in self.pieces)

    def values(self) -> list[torch.Tensor]:
        """Each result, of all rows.

        Raises:
            BatchError: one cannot be joined.
        """
        every = [piece for replica in self.sizes for piece in self.pieces[replica]]
        sizes = [size for replica in self.sizes for size in self.sizes[replica]]
        found = [piece for piece, size in zip(every, sizes, strict=True) if size]
        rows = [size for size in sizes if size]
        return [self._value(i, every, found, rows) for i in range(len(self.outputs))]

    def whole(self) -> Any:
        """What the model returns for all rows, in its own structure.

        Raises:
            BatchError: an output cannot be joined.
        """
        return self.rebuild(self.values())

    def apart(self) -> list[list[Any]]:
        """Per replica and microbatch, in the model's own structure; None for one without rows."""
        places = range(len(self.outputs))
        return [
            [
                self.rebuild([piece[i] for i in places]) if size else None
                for piece, size in zip(self.pieces[replica], sizes, strict=True)
            ]
            for replica, sizes in self.sizes.items()
        ]

    def _value(
        self,
        i: int,
        every: Sequence[Mapping[int, torch.Tensor]],
        pieces: Sequence[Mapping[int, torch.Tensor]],
        sizes: Sequence[int],
    ) -> torch.Tensor:
        output = self.outputs[i]
        if output.why and len(pieces) > 1:
            raise BatchError(
                f"forward() got {output.name!r} from each of {len(pieces)} microbatches and "
                f"cannot join them, as it {output.why}: compile with microbatches=1 and dp=1"
            )
        if output.how is How.LOSS:
            losses = torch.stack([piece[i].to(every[0][i].device) for piece in every])
            return loss_of_outputs(losses, self.weights)
        found = [piece[i].to(pieces[0][i].device) for piece in pieces]
        if output.how is How.ROWS:
            check_joins(found, output.dim, f"forward() returns {output.name!r}")
        return joined(found, output, sizes)


def check_joins(found: Sequence[torch.Tensor], dim: int, what: str) -> None:
    """Raises BatchError where tensors differ in another dimension than that of their rows."""
    shapes = [list(each.shape) for each in found]
    others = [[*shape[:dim], *shape[dim + 1 :]] for shape in shapes]
    odd = next((i for i, other in enumerate(others) if other != others[0]), 0)
    if odd:
        raise BatchError(
            f"{what} of shapes {shapes[0]} and {shapes[odd]} for two parts of the data, which "
            "cannot be joined by rows: give predict() fn=, which returns tensors that differ in "
            "their rows alone (lambda output, batch: output.logits.argmax(-1)[:, -1]), or pad "
            "alike (pipecompile.data.pad_to_multiple)"
        )


def own(value: torch.Tensor) -> torch.Tensor:
    """On the CPU, as pickles are made of whole storages."""
    moved = value.detach().cpu()
    apart = moved.untyped_storage().nbytes() != moved.nbytes or not moved.is_contiguous()
    return moved.contiguous().clone() if apart else moved

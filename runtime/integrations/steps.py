"""The steps of a Trainer, on a pipeline: windows of batches, their loss, outputs of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32

from ...compiler.ir.errors import BatchError
from ..pipeline import Pipeline
from .loading import Group
from .losses import ITEMS, LABELS, Loss
from .windows import Batch, Windows, emptied, share_of


@dataclass(frozen=True)
class Amounts:
    """What is in a window, over all replicas.

    Attributes:
        items: that the loss is a mean over; None where it is not told.
        batches: that have rows.
    """

    items: torch.Tensor | None
    batches: int


class Steps:
    """Runs windows.

    Args:
        accumulation: batches of a replica in a window.
        loss: that is computed outside of the model; None where the model returns it.
        takes_items: the model is given num_items_in_batch.
        adds: losses of batches are scaled for their sum already, and not for their mean.
        reduced: the pipeline computes in a narrower dtype than fp32.
    """

    def __init__(
        self,
        accumulation: int,
        dp: int,
        windows: Windows | None,
        loss: Loss | None,
        takes_items: bool,
        adds: bool,
        reduced: bool,
    ):
        self._count, self._dp, self._windows = accumulation, dp, windows
        self._loss, self._takes, self._adds, self._reduced = loss, takes_items, adds, reduced
        self._last: Batch | None = None

    def widened(self, output: Any) -> Any:
        """As accelerate has outputs of a model under mixed precision: in fp32."""
        return convert_to_fp32(output) if self._reduced else output

    def batch_of(self, groups: Sequence[Group], items: torch.Tensor | None) -> Batch:
        """What `Pipeline.step` takes."""
        batches = [self._inputs(b, items) for group in groups for b in group.batches]
        if not batches:
            if self._last is None:
                raise BatchError(
                    "a replica has no rows in the first step: there are fewer batches than "
                    "replicas, so make per_device_train_batch_size= or dp smaller"
                )
            return emptied(self._last)
        whole = batches[0] if self._windows is None else self._windows.join(batches)
        self._last = whole
        return whole

    def _inputs(self, batch: Batch, items: torch.Tensor | None) -> Batch:
        given = dict(batch)
        if self._loss is not None:
            if "labels" not in given:
                raise BatchError(
                    "label_smoothing_factor and compute_loss_func need 'labels' in the batches, "
                    f"which have {', '.join(given)}"
                )
            given[LABELS] = given.pop("labels")
            return given if items is None else given | {ITEMS: items}
        return given | {"num_items_in_batch": items} if self._takes and items is not None else given

    def run(self, pipe: Pipeline, batch: Batch, amounts: Amounts) -> torch.Tensor:
        """Gradients of a window; its loss, as the Trainer adds it up."""
        times = amounts.batches if self._adds and self._windows is not None else 1
        return pipe.forward_backward(batch, scale=times) * times

    def outputs(
        self, pipe: Pipeline, batches: Sequence[Batch], items: Sequence[torch.Tensor | None]
    ) -> list[Any]:
        """What the model returns for each batch, in evaluation mode; on every rank, on the CPU.

        Args:
            batches: all of them on every rank; at most `ahead` many.
        """
        given = [self._asked(*pair) for pair in zip(batches, items, strict=True)]
        shards, shard = pipe.data_shards, pipe.data_shard
        if self._windows is None:
            mine = share_of(given[0], shards, shard)
            return [self.widened(pipe.forward(mine, gather=True))]
        own = given[shard::shards]
        whole = self._windows.join(own) if own else emptied(given[0])
        found = pipe.returned(whole)
        places = [divmod(i, self._dp) for i in range(len(given))]
        return [self.widened(found[replica][number]) for number, replica in places]

    def _asked(self, batch: Batch, items: torch.Tensor | None) -> Batch:
        if self._loss is not None:
            return {k: v for k, v in batch.items() if k != "labels"}
        return self._inputs(batch, items)

    @property
    def ahead(self) -> int:
        """How many batches of an evaluation run at once."""
        return 1 if self._windows is None else self._count * self._dp


def first_rows(data: Any, rows: int) -> Any:
    """Of tensors in a structure, those that are a batch's."""
    if isinstance(data, (tuple, list)):
        return type(data)(first_rows(each, rows) for each in data)
    if isinstance(data, dict):
        return type(data)({key: first_rows(each, rows) for key, each in data.items()})
    return data[:rows] if isinstance(data, torch.Tensor) and data.dim() else data

"""Several collated batches as one, which is cut into them again.

Batches of a collator that pads have lengths of their own. A pipeline takes one batch per step, and
a callable cuts it into microbatches (``cut=``): it gives back the batches as they were, not padded
to the longest, so that each microbatch has the bits that one device computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...compiler.ir.errors import BatchError

Batch = Mapping[str, Any]


class Windows:
    """Joins batches, and is the ``cut=`` that knows them again."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[torch.Tensor, Sequence[Batch]]] = {}

    def join(self, batches: Sequence[Batch]) -> Batch:
        """One batch of several; forgets those before.

        Raises:
            BatchError: they have other keys.
        """
        self._known.clear()
        return self._joined(batches)

    def __call__(self, batch: Batch, pieces: int) -> list[Batch | None]:
        """Batch i goes to piece i % pieces; None for pieces without any."""
        _, batches = self._known[id(_main(batch))]
        dealt = [batches[i::pieces] for i in range(pieces)]
        return [self._joined(each) if each else None for each in dealt]

    def _joined(self, batches: Sequence[Batch]) -> Batch:
        first = batches[0]
        odd = next((each for each in batches if set(each) != set(first)), None)
        if odd is not None:
            raise BatchError(
                f"batches of one step have other keys: {', '.join(first)}, and {', '.join(odd)}: "
                "let the data collator give all of them the same"
            )
        whole = {key: _stacked([each[key] for each in batches]) for key in first}
        self._known[id(_main(whole))] = _main(whole), tuple(batches)
        return whole


def emptied(batch: Batch) -> Batch:
    """A batch like this one, without rows."""
    return {
        key: value[:0] if isinstance(value, torch.Tensor) and value.dim() else value
        for key, value in batch.items()
    }


def rows_of(batch: Batch) -> int:
    """Of a batch with a tensor of rows."""
    return len(_main(batch))


def share_of(batch: Batch, shards: int, shard: int) -> Batch:
    """The rows of a replica, as many as of the others to within one."""
    return {
        key: value.tensor_split(shards)[shard]
        if isinstance(value, torch.Tensor) and value.dim()
        else value
        for key, value in batch.items()
    }


def _main(batch: Batch) -> torch.Tensor:
    """The first tensor with rows: by it a batch is known."""
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.dim():
            return value
    raise BatchError(f"the batch has no tensor with rows: {', '.join(batch)}")


def _stacked(values: Sequence[Any]) -> Any:
    """Rows of all, padded with zeros, which nobody sees; what has no rows is that of the first."""
    first = values[0]
    if len(values) == 1 or not isinstance(first, torch.Tensor) or not first.dim():
        return first
    dims = range(1, first.dim())
    sizes = [max(value.shape[dim] for value in values) for dim in dims]
    whole = first.new_zeros((sum(map(len, values)), *sizes))
    start = 0
    for value in values:
        at = (slice(start, start + len(value)), *(slice(0, value.shape[dim]) for dim in dims))
        whole[at] = value
        start += len(value)
    return whole

"""Batches of a Trainer's loader, dealt to replicas: one group of them is what a Trainer counts.

A Trainer takes ``gradient_accumulation_steps`` items of its loader per step. Here an item is a
group: one batch for each replica. A process loads those of its own replica alone; the one that
plays all ranks loads them all. Order and composition of the batches are those of one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Share:
    """What of a group a process loads.

    Attributes:
        dp: batches of a group, one for each replica.
        replica: whose batch is loaded; None for all of them.
        together: all of them are collated as one batch.
        agree: called on every rank before an order is drawn, so that all draw the same.
    """

    dp: int
    replica: int | None
    together: bool
    agree: Callable[[], None]


class Group:
    """The batches of a group that are loaded here: none, where a replica has none left."""

    def __init__(self, batches: Sequence[Mapping[str, Any]]):
        self.batches = list(batches)

    def pin_memory(self) -> Group:
        """Of all tensors, as torch's loaders ask for."""
        return Group(
            [
                {k: v.pin_memory() if hasattr(v, "pin_memory") else v for k, v in batch.items()}
                for batch in self.batches
            ]
        )


class Groups:
    """A batch sampler of groups over one of batches.

    Args:
        batches: gives lists of indices; it has a length.
    """

    def __init__(self, batches: Any, share: Share):
        self._batches, self._share = batches, share

    @property
    def sampler(self) -> Any:
        """Of rows; accelerate puts one in its place whose order follows from seed and epoch."""
        return self._batches.sampler

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self._batches.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self._batches) // self._share.dp)

    def __iter__(self) -> Iterator[list[Any]]:
        self._share.agree()
        group: list[list[Any]] = []
        for batch in self._batches:
            group.append(batch)
            if len(group) == self._share.dp:
                yield self._mine(group)
                group = []
        if group:
            yield self._mine(group)

    def _mine(self, group: Sequence[list[Any]]) -> list[Any]:
        replica = self._share.replica
        chosen = group if replica is None else group[replica : replica + 1]
        return [row for batch in chosen for row in batch]


class Collated:
    """Collates the rows of a group.

    Args:
        size: rows of a batch.
        whole: the rows are those of all replicas, although one's are wanted.
    """

    def __init__(self, collate: Collate, size: int, share: Share, whole: bool):
        self._collate, self._size, self._whole = collate, size, whole
        self._replica, self._together = share.replica, share.together

    def __call__(self, rows: list[Any]) -> Group:
        size = len(rows) if self._together and self._replica is None else self._size
        parts = [rows[i : i + size] for i in range(0, len(rows), max(1, size))]
        if self._whole and self._replica is not None:
            parts = parts[self._replica : self._replica + 1]
        return Group([self._collate(part) for part in parts])


class Rows:
    """A data set of which no rows can be asked for too: a replica that has none left loads none."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        if indices and hasattr(self.dataset, "__getitems__"):
            found: list[Any] = self.dataset.__getitems__(indices)
            return found
        return [self.dataset[index] for index in indices]


def grouped(loader: DataLoader[Any], share: Share) -> DataLoader[Any]:
    """A loader of groups of the batches of another."""
    size = loader.batch_size
    assert size is not None, "the Trainer has given one"
    options = {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        "in_order": loader.in_order,
    }
    stream = isinstance(loader.dataset, IterableDataset)
    collate = Collated(loader.collate_fn, size, share, whole=stream)
    if stream:
        options |= {"batch_size": size * share.dp, "drop_last": loader.drop_last}
        return DataLoader(loader.dataset, collate_fn=collate, **options)
    batches: Any = Groups(loader.batch_sampler, share)
    rows: Any = Rows(loader.dataset)
    return DataLoader(rows, collate_fn=collate, batch_sampler=batches, **options)


def peeked(loader: DataLoader[Any], groups: int) -> list[Group]:
    """The first groups, loaded in this process by a loader of their own."""
    options: dict[str, Any] = {"collate_fn": loader.collate_fn}
    if isinstance(loader.dataset, IterableDataset):
        options |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    else:
        options |= {"batch_sampler": loader.batch_sampler}
    found = zip(range(groups), DataLoader(loader.dataset, **options), strict=False)
    return [group for _, group in found]

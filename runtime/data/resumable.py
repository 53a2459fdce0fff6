"""A loader of the user's that goes on in the middle of a pass, with the batch that comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ...compiler.ir.errors import OptionError, StateError

_COPIED = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "in_order",
)


class Resumable:
    """A torch `DataLoader`, or something else that gives batches, whose position can be saved.

        rows = pipecompile.data.Resumable(DataLoader(...))
        if resuming:
            pipe.load("run", data=rows)
        for epoch in range(rows.epoch, epochs):
            for batch in rows:
                pipe.step(batch)
        pipe.save("run", data=rows)

    Before each pass ``set_epoch`` of its sampler, batch sampler and data set is called, where they
    have one, as `DistributedSampler` does. A pass that is resumed is drawn in the order in which it
    began. Of a `DataLoader` over a data set with a length, the batches before are not loaded;
    anything else is read up to there.

    Attributes:
        epoch: passes that were begun before this one.
        batch: batches of this pass that were given out.

    Raises:
        OptionError: the loader knows its position itself, or gives no batches.
    """

    def __init__(self, loader: Iterable[Any]):
        if hasattr(loader, "state_dict"):
            raise OptionError(
                f"a {type(loader).__name__} knows its position itself: give it to save(data=...) "
                "and load(data=...) as it is"
            )
        if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
            raise OptionError(
                f"Resumable() was given a {type(loader).__name__}: give a loader, which can be "
                "passed through more than once"
            )
        self._loader = loader
        self.epoch = self.batch = 0
        self._begun = False
        self._start: list[torch.Tensor] = []  # of each generator, when this pass began

    def __len__(self) -> int:
        """Batches in a pass."""
        if not isinstance(self._loader, Sized):
            raise TypeError(f"a {type(self._loader).__name__} has no length")
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        if self._begun:  # and left before its end
            self.epoch, self.batch = self.epoch + 1, 0
        self._begun = True
        for part in self._parts():
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(self.epoch)
        for batch in self._rest():
            self.batch += 1
            yield batch
        self.epoch, self.batch, self._begun = self.epoch + 1, 0, False

    def _parts(self) -> list[Any]:
        """The loader, and what it draws from; each once."""
        batches = getattr(self._loader, "batch_sampler", None)
        found = [self._loader, batches, getattr(batches, "sampler", None)]
        found += [getattr(self._loader, name, None) for name in ("sampler", "dataset")]
        return list({id(part): part for part in found if part is not None}.values())

    def _generators(self) -> list[torch.Generator]:
        """What the order is drawn from; torch's own one first."""
        found = [getattr(part, "generator", None) for part in self._parts()]
        own = {id(each): each for each in found if isinstance(each, torch.Generator)}
        return [torch.default_generator, *own.values()]

    def _rest(self) -> Iterator[Any]:
        """The batches of this pass that were not given out yet."""
        generators = self._generators()
        if not self.batch:
            self._start = [each.get_state() for each in generators]
            yield from self._loader
            return
        now = [each.get_state() for each in generators]

        def restore() -> None:
            for each, state in zip(generators, now, strict=True):
                each.set_state(state)

        for each, state in zip(generators, self._start, strict=True):
            each.set_state(state)
        yield from _without(self._loader, self.batch, restore)

    def state_dict(self) -> dict[str, Any]:
        """How far it is, and what this pass was drawn from."""
        own = [each.get_state() for each in self._generators()[1:]]
        start = self._start if self.batch else []
        return {"epoch": self.epoch, "batch": self.batch, "start": list(start), "now": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that was given out last; the next pass begins there.

        Raises:
            StateError: that is no position, or one of a loader with other generators; nothing has
                changed.
        """
        known = isinstance(state, Mapping) and {"epoch", "batch", "start", "now"} <= state.keys()
        counts = [state["epoch"], state["batch"]] if known else []
        if not counts or any(type(n) is not int or not 0 <= n < 2**63 for n in counts):
            raise StateError(f"the position of a loader has epoch and batch, and not {state!r}")
        generators = self._generators()
        start, now = list(state["start"]), list(state["now"])
        if len(now) != len(generators) - 1 or (start and len(start) != len(generators)):
            raise StateError(
                f"a loader with {len(now)} generators of its own was saved, and this one has "
                f"{len(generators) - 1}: make it as it was"
            )
        for each, own in zip(generators[1:], now, strict=True):
            each.set_state(own)
        self.epoch, self.batch, self._start = state["epoch"], state["batch"], start
        self._begun = False


class _Without:
    """A sampler without its first items, which are drawn all the same.

    Args:
        drawn: called when they are.
    """

    def __init__(self, sampler: Any, count: int, drawn: Callable[[], None]):
        self._sampler, self._count, self._drawn = sampler, count, drawn

    def __len__(self) -> int:
        return max(0, len(self._sampler) - self._count)

    def __iter__(self) -> Iterator[Any]:
        items = iter(self._sampler)
        for _ in range(self._count):
            next(items, None)
        self._drawn()
        yield from items


def _without(loader: Any, count: int, drawn: Callable[[], None]) -> Iterator[Any]:
    """The batches of a loader but for the first ones, which are not loaded where that can be."""
    if type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset):
        given = {name: getattr(loader, name) for name in _COPIED if hasattr(loader, name)}
        if loader.batch_sampler is not None:
            given["batch_sampler"] = _Without(loader.batch_sampler, count, drawn)
        else:
            given |= {"sampler": _Without(loader.sampler, count, drawn), "batch_size": None}
        yield from DataLoader(loader.dataset, **given)
        return
    batches = iter(loader)
    for _ in range(count):
        next(batches, None)
    drawn()
    yield from batches

"""A data set in global batches, of which each process loads the rows of its replica."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ...compiler.capture.batch import flatten
from ...compiler.ir.errors import OptionError, StateError
from ...compiler.ir.ops import mix
from ...compiler.options.microbatches import cut as parted
from .cutting import Cut, emptied, share_of

_OURS = ("dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "generator")


class DataSetLoader:
    """Iterates over a data set once; made by `Pipeline.loader`, or for it by `batches`.

    A pass over it gives the batches in the same order, and each replica the same rows of them,
    in one process and in many. What is left at the end is a smaller batch; a replica without rows
    in it gets an empty one.

    Args:
        options: of `torch.utils.data.DataLoader`.

    Attributes:
        epoch: passes that were begun before this one.
        batch: global batches of this pass that were given out.

    Raises:
        OptionError: not a data set with a length, or an option that is not the user's.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: Any,
        /,
        shuffle: bool = False,
        drop_last: bool = False,
        whole_batches: bool = False,
        **options: Any,
    ):
        _check(dataset, batch_size, options)
        self._dataset, self._options = dataset, options
        self._size: int = batch_size
        self._shuffle, self._drop_last, self._whole = shuffle, drop_last, whole_batches
        self._bound = False
        self.epoch = self.batch = 0
        self._begun = False

    def bind(self, shards: int, shard: int, seed: int, cut: Cut | None, pin_memory: bool) -> None:
        """Load the rows of one process of a pipeline.

        Args:
            shards, shard: into how many shares a global batch is cut, and which one is loaded.
            seed: of the order.
            cut: makes the shares of a whole batch; None for rows.
            pin_memory: unless an option says otherwise.

        Raises:
            OptionError: it belongs to a pipeline already.
        """
        if self._bound:
            raise OptionError("this loader belongs to a pipeline already: make one for each")
        self._shards, self._shard, self._seed, self._cut = shards, shard, seed, cut
        self._options = {"pin_memory": pin_memory} | self._options
        self._bound = True

    def __len__(self) -> int:
        """Batches in a pass."""
        rows = len(self._dataset)
        return rows // self._size if self._drop_last else -(-rows // self._size)

    def __iter__(self) -> Iterator[Any]:
        if not self._bound:
            raise OptionError(
                "a loader that pipecompile.data.batches() made knows which rows are its own when "
                "pipe.loader(...) was given it: go through what that returns"
            )
        return self._pass()

    def _pass(self) -> Iterator[Any]:
        if self._begun:  # and left before its end
            self.epoch, self.batch = self.epoch + 1, 0
        self._begun = True
        chosen = self._batches()[self.batch :]
        parts = [parted(len(rows), self._shards) for rows in chosen]
        starts = [sum(sizes[: self._shard]) for sizes in parts]
        sizes = [each[self._shard] for each in parts]
        if not self._whole:  # a share without rows is cut from a batch of one
            chosen = [
                rows[start : start + size] or rows[:1]
                for rows, start, size in zip(chosen, starts, sizes, strict=True)
            ]
            starts = [0] * len(starts)
        loader = DataLoader(
            self._dataset, batch_sampler=chosen, generator=self._generator(), **self._options
        )
        for batch, rows, start, size in zip(loader, chosen, starts, sizes, strict=True):
            self.batch += 1
            if self._cut is not None:
                yield self._piece(self._cut, batch, size)
            else:
                yield batch if size == len(rows) else _rows(batch, start, size)
        self.epoch, self.batch, self._begun = self.epoch + 1, 0, False

    def _piece(self, cut: Cut, batch: Any, size: int) -> Any:
        """The share of this process of what was collated, of which so many samples are its own."""
        if self._whole and self._shards > 1:
            return share_of(cut, batch, self._shards, self._shard)
        return batch if size else emptied(batch)

    def _batches(self) -> list[list[int]]:
        """The rows of each global batch of a pass."""
        count = len(self._dataset)
        order = torch.randperm(count, generator=self._generator()) if self._shuffle else None
        rows = list(range(count)) if order is None else order.tolist()
        return [rows[i * self._size : (i + 1) * self._size] for i in range(len(self))]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(mix(self._seed, self.epoch))

    def state_dict(self) -> dict[str, int]:
        """How far it is, the same in every process: it holds for any number of replicas."""
        return {"epoch": self.epoch, "batch": self.batch, "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after the batch that was given out last; the next pass begins there.

        Raises:
            StateError: that is no position, or not one in this data set; nothing has changed.
        """
        _check_position(state)
        if state["batch"] > len(self):
            raise StateError(
                f"a loader was after batch {state['batch']} of a pass, and this data set has "
                f"{len(self)}: give loader() the data set and batch_size= that it had"
            )
        self.epoch, self.batch, self._seed = state["epoch"], state["batch"], state["seed"]
        self._begun = False


def batches(dataset: Any, batch_size: int, **options: Any) -> DataSetLoader:
    """The global batches of a data set, before there is a pipeline to load them for.

    ``len`` of it is the number of steps in a pass, which a learning rate schedule may need when the
    pipeline is compiled; ``pipe.loader(batches)`` then makes it the loader of that pipeline.

    Args:
        dataset, batch_size, options: as `Pipeline.loader` has them.

    Raises:
        OptionError: the data set has no length, or an option is not known.
    """
    return DataSetLoader(dataset, batch_size, **options)


class DataSetLoaders:
    """Those of a pipeline, as one position in the data. Loaders are told apart by the order in
    which they were made; one that is made later takes up the position that was loaded for it."""

    def __init__(self) -> None:
        self._made: list[weakref.ref[DataSetLoader]] = []
        self._waiting: list[Mapping[str, int]] = []

    def add(self, loader: DataSetLoader) -> None:
        self._made.append(weakref.ref(loader))
        if self._waiting:
            loader.load_state_dict(self._waiting.pop(0))

    @property
    def empty(self) -> bool:
        return not self._alive

    @staticmethod
    def is_state(state: Any) -> bool:
        """Whether `state_dict` has returned it."""
        return isinstance(state, dict) and list(state) == ["loaders"]

    @property
    def _alive(self) -> list[DataSetLoader]:
        return [each for each in (made() for made in self._made) if each is not None]

    def state_dict(self) -> dict[str, Any]:
        return {"loaders": [loader.state_dict() for loader in self._alive]}

    def kept(self) -> Callable[[], None]:
        """What puts all of them back to where they are now."""
        waiting, alive = list(self._waiting), [(each, dict(vars(each))) for each in self._alive]

        def undo() -> None:
            self._waiting = waiting
            for loader, attributes in alive:
                vars(loader).update(attributes)

        return undo

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Positions of the loaders that there are, and of those to come.

        Raises:
            StateError: one is no position.
        """
        for each in state["loaders"]:
            _check_position(each)
        self._waiting = list(state["loaders"])
        for loader in self._alive[: len(self._waiting)]:
            loader.load_state_dict(self._waiting.pop(0))


def _check_position(state: Any) -> None:
    known = isinstance(state, Mapping) and {"epoch", "batch", "seed"} <= state.keys()
    if not known or any(type(state[key]) is not int for key in ("epoch", "batch", "seed")):
        raise StateError(f"the position of a loader has epoch, batch and seed, and not {state!r}")
    if not (0 <= state["epoch"] < 2**63 and 0 <= state["batch"] < 2**63):
        raise StateError(f"a loader cannot be in epoch {state['epoch']}, batch {state['batch']}")
    if not -(2**63) <= state["seed"] < 2**64:
        raise StateError(f"a loader's seed cannot be {state['seed']}")


def _rows(batch: Any, start: int, size: int) -> Any:
    """So many rows of a batch."""
    values, spec = flatten(batch)
    mine = [value[start : start + size] if value.dim() else value for value in values]
    return spec.with_rows(size).build(mine)


def _check(dataset: Any, batch_size: Any, options: Mapping[str, Any]) -> None:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise OptionError(
            f"loader() cuts a data set by the numbers of its rows, and a {type(dataset).__name__} "
            "has none: give it to a DataLoader of yours, with the rows that pipe.data_shards and "
            "pipe.data_shard say, and that to save(data=...)"
        )
    if type(batch_size) is not int or batch_size < 1:
        raise OptionError(f"batch_size={batch_size!r}: give the rows of a global batch, 1 or more")
    known = set(inspect.signature(DataLoader).parameters) - set(_OURS)
    for name in options:
        if name not in known:
            raise OptionError(
                f"loader() has no option {name!r}: it takes shuffle, drop_last, whole_batches, and "
                f"of DataLoader {', '.join(sorted(known))}"
            )

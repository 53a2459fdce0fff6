"""The batches of a loader, on all processes until the last one has none left."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from ...compiler.capture import batch as batches
from ...compiler.capture.batch import BatchSpec
from ...compiler.ir.errors import BatchError, RankMismatchError

_END = object()
Gather = Callable[[Any], list[Any]]


def is_loader(data: Any, gather: Gather) -> bool:
    """Whether it gives batches, and is none; where a process has None, what the others have.

    Raises:
        RankMismatchError: some processes have a batch and others a loader.
    """
    kinds = (torch.Tensor, Mapping, Sequence, np.ndarray)
    gives = isinstance(data, Iterable) and not isinstance(data, kinds) and not is_dataclass(data)
    found = set(gather(None if data is None else gives)) - {None}
    if len(found) > 1:
        raise RankMismatchError("one rank was given a batch and another a loader: give all alike")
    return True in found


def in_step(data: Iterable[Any] | None, gather: Gather) -> Iterator[Any]:
    """The batches of this process's loader, and empty ones while others have some.

    Args:
        data: None in a process that needs no batches, which gets None while others have some.
        gather: what every process gives, to all of them.

    Raises:
        BatchError: no process has a batch.
    """
    found, count = iter(() if data is None else data), 0
    while True:
        batch = next(found, _END)
        ended = None if data is None else batch is _END
        everyone = gather(ended)
        if False not in everyone:
            break
        if True in everyone:
            specs = gather(batches.flatten(batch)[1] if ended is False else None)
            batch = _empty(next(filter(None, specs))) if ended else batch
        count += 1
        yield None if data is None else batch
    if not count:
        raise BatchError("the loader has no batch")


def _empty(spec: BatchSpec) -> Any:
    none = spec.with_rows(0)
    return none.build([torch.zeros(leaf.shape, dtype=leaf.dtype) for leaf in none.leaves])


@contextlib.contextmanager
def shown_progress(data: Any, shown: bool) -> Iterator[Callable[[], None]]:
    """Yields what to call after each batch; the bar is on stderr."""
    if not shown:
        yield lambda: None
        return
    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("evaluating", total=len(data) if hasattr(data, "__len__") else None)
        yield lambda: bar.advance(task)

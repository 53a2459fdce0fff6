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

from ...compiler.capture.batch import BatchSpec
from ...compiler.ir.errors import BatchError, PipecompileError

_END = object()
Gather = Callable[[Any], list[Any]]


def is_loader(data: Any) -> bool:
    """Whether it gives batches, and is none."""
    kinds = (torch.Tensor, Mapping, Sequence, np.ndarray)
    return isinstance(data, Iterable) and not isinstance(data, kinds) and not is_dataclass(data)


def in_step(
    data: Iterable[Any],
    gather: Gather,
    needed: Callable[[], bool],
    flat: Callable[[Any], tuple[Any, BatchSpec]],
    trouble: Callable[[], PipecompileError | None] = lambda: None,
) -> Iterator[Any]:
    """The batches of this process's loader, and empty ones while others have some.

    Args:
        flat: a batch as tensors, and its spec.
        gather: what every process gives, to all of them.
        needed: whether this process needs batches; where it does not, it gets None for empty ones.
        trouble: what has gone wrong here with the last batch, if anything has.

    Raises:
        BatchError: no process has a batch.
        PipecompileError: what has gone wrong on the first rank, on every rank.
    """
    found, count = iter(data), 0
    while True:
        batch = next(found, _END)
        ended = batch is _END
        failed = trouble()
        everyone = gather((ended, ended and needed(), failed))
        if (first := next(filter(None, (each for *_, each in everyone)), None)) is not None:
            raise failed or first
        if all(over for over, *_ in everyone):
            break
        if any(lacks for _, lacks, _ in everyone):
            specs = gather(None if ended or batch is None else flat(batch)[1])
            batch = _empty(next(filter(None, specs))) if ended and needed() else batch
        count += 1
        yield None if batch is _END else batch
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

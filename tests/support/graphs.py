"""A stand-in for CUDA graphs: it replays by running the program again over the same memory.

What is recorded keeps its arguments and results in their places, as a CUDA graph does; so who reads
a place that has been written over since, or never, gets other numbers than an eager run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from pipecompile.compiler.ir import ops
from pipecompile.runtime.graphs import recorder
from pipecompile.runtime.graphs.recorder import Run, Values


@dataclass
class Counts:
    """Attributes:
    recorded, replayed: of all ranks.
    """

    recorded: int = 0
    replayed: int = 0
    draws: list[int] = field(default_factory=list)


class _Chances:
    def __init__(self, seed: int):
        self.seed, self.count = seed, 0

    def draw(self, site: int, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.count += 1
        return ops.seeded(self.seed, site, op, *args, **kwargs)


class _Recording:
    def __init__(self, run: Run, made: Values, counts: Counts):
        self._run, self._made, self._counts = run, made, counts

    def replay(self, seed: int) -> None:
        self._counts.replayed += 1
        _rewrite(self._made, self._run(_Chances(seed)))


class Recorder:
    def __init__(self, counts: Counts):
        self._counts = counts

    def record(self, run: Run, seed: int, draws: int) -> tuple[_Recording, Values]:
        chances = _Chances(seed)
        made = run(chances)
        self._counts.recorded += 1
        self._counts.draws.append(draws)
        assert chances.count == draws
        return _Recording(run, made, self._counts), made


def _rewrite(places: Any, values: Any) -> None:
    """A result may have several parts, as that of an operator whose parts are taken later."""
    for place, value in zip(places, values, strict=True):
        if isinstance(place, (tuple, list)):
            _rewrite(place, value)
        elif place.data_ptr() != value.data_ptr():  # a view of an argument is what it was
            _distinct(place).copy_(_distinct(value))


def _distinct(tensor: torch.Tensor) -> torch.Tensor:
    """Without the repeats of expanded dimensions."""
    for dim, step in enumerate(tensor.stride()):
        if step == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


@contextmanager
def recording() -> Iterator[Counts]:
    """Inside, ``cudagraphs=`` works on the CPU."""
    counts = Counts()
    with mock.patch.dict(recorder.RECORDERS, {"cpu": lambda device: Recorder(counts)}):
        yield counts

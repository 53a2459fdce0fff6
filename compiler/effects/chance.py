"""Randomness and time that Python gives: read once while a graph is traced, and never again.

torch's own random operators are in the graph and draw anew in every step; ``random``,
``numpy.random`` and the clock are not. What forward makes of them is found by tracing it again with
other values: if that gives the same graph, it makes nothing of them.
"""

from __future__ import annotations

import pickle
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from .code import is_foreign

_CLOCKS = ("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns")
_UNIFORM = ("random", "random_sample", "ranf", "sample", "rand", "uniform")  # of numpy
_SECONDS = 1_000_000
_SHARED: Any = random.random.__self__  # type: ignore[attr-defined]
_NUMPY = [
    name
    for name in sorted(vars(np.random.RandomState))
    if hasattr(np.random, name) and not name.startswith(("_", "get_", "set_", "seed"))
]

FRACTIONS = (0.0, 1.0 - 2.0**-53)
"""The least and the greatest that ``random.random()`` gives: between them a branch changes."""


@contextmanager
def drawing() -> Iterator[set[str]]:
    """A forward inside; afterwards the generators are as they were, and what is yielded names what
    forward has read."""
    read: set[str] = set()

    def noting(name: str) -> Callable[[], Any]:
        real = getattr(time, name)

        def clock() -> Any:
            if not is_foreign(_asking()):
                read.add(f"time.{name}")
            return real()

        return clock

    state, states = _SHARED.getstate(), np.random.get_state(legacy=False)
    bits = pickle.dumps(states)
    try:
        with ExitStack() as stack:
            for name in _CLOCKS:
                stack.enter_context(_patched(time, name, noting(name)))
            yield read
    finally:
        if _SHARED.getstate() != state:
            read.add("random")
            _SHARED.setstate(state)
        if pickle.dumps(np.random.get_state(legacy=False)) != bits:
            read.add("numpy.random")
            np.random.set_state(states)


@dataclass
class Asked:
    """What a forward has asked for.

    Attributes:
        lines: where, the innermost frame first.
        unsure: functions of which not all values are known.
    """

    lines: list[str] = field(default_factory=list)
    unsure: set[str] = field(default_factory=set)


@contextmanager
def drawn_as(fraction: float) -> Iterator[Asked]:
    """Inside, ``random`` and ``numpy.random`` give this thread values at this fraction of what they
    may give, and clocks are elsewhere."""
    asked = Asked()

    def told(value: Any) -> Any:
        frames = reversed(traceback.extract_stack())
        mine = [f for f in frames if not is_foreign(f.filename) and f.filename != __file__]
        asked.lines += [f"{f.filename}:{f.lineno} ({f.line})" for f in mine[:1]]
        return value

    def drawn(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: told(_numpy_like(asked, fraction, name, args, kwargs))

    def moved(name: str) -> Callable[[], Any]:
        real = getattr(time, name)
        away = (1 + fraction) * _SECONDS
        shift = int(away * 10**9) if name.endswith("_ns") else away

        def clock() -> Any:
            if is_foreign(_asking()):
                return real()
            return told(real() + shift)

        return clock

    generator = _Extreme(fraction, told)
    with ExitStack() as stack:
        for name in dir(generator):
            if getattr(getattr(random, name, None), "__self__", None) is _SHARED:
                stack.enter_context(_patched(random, name, getattr(generator, name)))
        for name in _NUMPY:
            stack.enter_context(_patched(np.random, name, drawn(name)))
        for name in _CLOCKS:
            stack.enter_context(_patched(time, name, moved(name)))
        yield asked


def _asking() -> str:
    """The file of the code that called what stands here for a function."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return str(frame.f_code.co_filename)


def _patched(module: Any, name: str, function: Callable[..., Any]) -> Any:
    """For this thread; others go on as before."""
    real, mine = getattr(module, name), threading.get_ident()

    def called(*args: Any, **kwargs: Any) -> Any:
        return (function if threading.get_ident() == mine else real)(*args, **kwargs)

    return mock.patch.object(module, name, called)


def _numpy_like(asked: Asked, fraction: float, name: str, args: Any, kwargs: Any) -> Any:
    made = getattr(np.random.RandomState(0), name)(*args, **kwargs)
    if name not in _UNIFORM:
        asked.unsure.add(f"numpy.random.{name}")
        return made
    low, high = 0.0, 1.0
    if name == "uniform":
        low, high = (
            kwargs.get(k, v) for k, v in zip(("low", "high"), (*args, 0.0, 1.0), strict=False)
        )
    return (np.zeros_like(made) + low + fraction * (high - low))[()]


class _Extreme(random.Random):
    """Of all that may come the same fraction, always."""

    def __init__(self, fraction: float, told: Callable[[Any], Any]):
        self._fraction, self._told = fraction, told
        super().__init__(0)

    def random(self) -> float:
        value: float = self._told(self._fraction)
        return value

    def getrandbits(self, k: int, /) -> int:
        bits: int = self._told(int(self._fraction * ((1 << k) - 1)))
        return bits

    def _randbelow(self, n: int) -> int:
        below: int = self._told(min(int(self._fraction * n), n - 1))
        return below

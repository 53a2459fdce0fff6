"""Importing torch, and tracing, makes objects by the million, of which next to none is garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

SELDOM = (50_000, 5, 5)  # so many objects more than there were, where Python has 700


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python does not look for cycles of objects that nobody can reach; afterwards it does
    if it did before."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def seldom_collected() -> Iterator[None]:
    """Inside, Python looks for such cycles after so many more objects that it takes next to no
    time; afterwards it does as it did before. For processes that nobody else works in."""
    before = gc.get_threshold()
    gc.set_threshold(*SELDOM)
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()
        gc.set_threshold(*before)
        if not _alone:
            gc.unfreeze()


def settle() -> None:
    """What there is now, modules and a model, is there to stay: inside `seldom_collected` nobody
    looks at it again, which takes longer than all that comes of it."""
    if _alone:
        gc.freeze()


_alone: list[bool] = []

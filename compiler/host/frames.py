"""Room for the frames of functions, so that no loop runs across the end of it.

CPython (from 3.11) takes memory for frames in pieces of 16 KiB. A call that does not fit into what
is left of one maps another, and unmaps it when it returns. Where a loop happens to stand there each
turn does that: at a few depths of the stack operators take several times as long to start
(https://github.com/python/cpython/issues/142183; late releases of 3.13 and 3.14 keep one piece).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

SLOTS = 1 << 16  # of a frame that no piece has room for: half of a piece of 1 MiB


def with_room(function: Callable[P, T]) -> Callable[P, T]:
    """The same function; what it calls finds 512 KiB for frames, of which it takes what it needs.

    A frame that is said to need as much as `SLOTS` gets a piece of its own, twice as large: such
    are of a power of two, with a thousand slots to spare.
    """

    def roomy(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    roomy.__code__ = roomy.__code__.replace(co_stacksize=SLOTS)
    return functools.wraps(function)(roomy)

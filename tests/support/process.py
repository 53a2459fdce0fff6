"""How every process of the tests is set up."""

from __future__ import annotations

import functools
import gc
import traceback
from typing import Any

import torch
from torch.utils import _traceback


def settle() -> None:
    """One thread, as two processes share two cores; and what was imported is no garbage.

    The collector seldom looks for some: that is an eighth of the time of a compile. And a line of
    source is looked up once: torch notes the stack at every node that it traces, and pytest's is
    deep.
    """
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    _traceback._extract_symbolized_tb = _frames


def _frames(stack: list[dict[str, Any]], skip: int) -> traceback.StackSummary:
    """As torch's."""
    return traceback.StackSummary(
        _frame(each["filename"], each["line"], each["name"]) for each in reversed(stack[skip:])
    )


_frame = functools.cache(traceback.FrameSummary)

"""How every process of the tests is set up."""

from __future__ import annotations

import gc

import torch


def settle() -> None:
    """One thread, as two processes share two cores; and what was imported is no garbage.

    The collector seldom looks for some: that is an eighth of the time of a compile.
    """
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)

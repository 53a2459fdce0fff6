"""Keeps the memory that one microbatch frees for the next one, as CUDA's allocator does.

glibc gives the end of its heap back to the system when it is free, and maps larger tensors anew
each time. A step frees and takes tens of megabytes many times, and every page faults again.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_* of malloc.h
_NEVER, _LARGEST = -1, 32 << 20  # glibc allows no larger one

_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
"""Environment variables with which users choose for themselves."""


def keep_heap() -> None:
    """For this process, from here on; nothing where the allocator is not glibc's, or is chosen."""
    chosen = any(name in os.environ for name in _CHOSEN)
    if chosen or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_THRESHOLD, _LARGEST)

"""What tests of ZeRO share: its levels, and parcels that are small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipecompile.compiler.ir import shards

LEVELS = (1, 2, 3)


@contextmanager
def small_parcels(least_bytes: int = 4 << 10) -> Iterator[None]:
    """So that several are under way, and tensors are cut into pieces."""
    before, shards.LEAST_BYTES = shards.LEAST_BYTES, least_bytes
    try:
        yield
    finally:
        shards.LEAST_BYTES = before

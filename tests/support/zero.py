"""What tests of ZeRO share: its levels, and parcels that are small."""

from __future__ import annotations

from typing import Any
from unittest import mock

from pipecompile.compiler.ir import shards

LEVELS = (1, 2, 3)


def small_parcels(least_bytes: int = 4 << 10) -> Any:
    """Around a function or a block: several are under way, and tensors are cut into pieces."""
    return mock.patch.object(shards, "LEAST_BYTES", least_bytes)

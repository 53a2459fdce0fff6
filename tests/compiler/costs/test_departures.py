"""What of an exchange nothing hides: the last parcel, of the size that parcels have."""

from __future__ import annotations

import pytest
import torch
from pipecompile.compiler.ir.shards import (
    LEAST_BYTES,
    PARCEL_BYTES,
    SHARES,
    Item,
    parcel_bytes,
    parcels_of,
)


@pytest.mark.parametrize("megabytes", [1, 8, 64, 2048])
def test_parcels_are_no_larger_than_is_told(megabytes: int) -> None:
    item = Item("a", (megabytes, 1 << 18), torch.float32)
    total = megabytes << 20
    most = parcel_bytes(total)
    assert LEAST_BYTES <= most <= PARCEL_BYTES
    assert most >= min(PARCEL_BYTES, total // SHARES)
    sizes = [sum(each.sizes) * 4 for each in parcels_of([item], 1)]
    assert sum(sizes) == total
    assert max(sizes) <= most

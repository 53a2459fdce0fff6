"""Seconds of matrix products, by shape and dtype.

A library cuts the result into tiles, which the device's multiprocessors work off in waves; a last
wave that is not full takes as long as a full one. A tile takes as long as its inner dimension and a
constant of it, in which the pipeline of a tile fills and its result is written. Where there are
fewer tiles than multiprocessors the inner dimension is split. Of all ways the fastest is taken, as
libraries do by their heuristics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from .forms import Product

SPLITS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a result that a multiprocessor makes at once, and its share of the best
    rate: small tiles read their operands more often."""

    rows: int
    columns: int
    share: float


@dataclass(frozen=True)
class Products:
    """What products reach.

    Attributes:
        units: multiprocessors, or cores.
        share: dtype -> of its peak, what a very large product reaches; "" for others.
        fill: elements of the inner dimension that the start and the end of a tile are worth.
    """

    units: int
    tiles: tuple[Tile, ...]
    share: Mapping[str, float] = field(hash=False)
    fill: float

    def share_of(self, dtype: str) -> float:
        return self.share.get(dtype, self.share[""])

    def seconds(self, form: Product, dtype: str, peak: float) -> float:
        """Never less than its FLOPs at the share of the peak take.

        Args:
            peak: FLOP/s of the dtype.
        """
        rate = peak * self.share_of(dtype) / self.units  # of a unit
        return self.unit_flops(form) / rate

    def unit_flops(self, form: Product) -> float:
        """FLOPs that the busiest unit could have done meanwhile."""
        return _unit_flops(form, self.units, self.tiles, self.fill)

    def efficiency(self, form: Product, dtype: str) -> float:
        """Of the peak."""
        return form.flops / (self.unit_flops(form) * self.units) * self.share_of(dtype)


@lru_cache(maxsize=100_000)
def _unit_flops(form: Product, units: int, tiles: tuple[Tile, ...], fill: float) -> float:
    least = float("inf")
    for tile in tiles:
        count = form.batch * -(-form.m // tile.rows) * -(-form.n // tile.columns)
        for split in SPLITS:
            if split > 1 and count * split > 2 * units:
                break
            waves = -(-count * split // units)
            inner = -(-form.k // split) + fill
            least = min(least, waves * 2 * tile.rows * tile.columns * inner / tile.share)
    return least

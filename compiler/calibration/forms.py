"""The shapes that tell how much of its peak a kernel reaches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """As many products of an (m, k) and a (k, n) matrix as ``batch`` says."""

    batch: int
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k

    @staticmethod
    def like(flops: int) -> Product:
        """A cube, for products whose shape is not known."""
        side = max(1, round((flops / 2) ** (1 / 3)))
        return Product(1, side, side, max(1, round(flops / (2 * side * side))))


@dataclass(frozen=True)
class Attention:
    """Fused attention.

    Attributes:
        heads: of all rows together.
        queries, keys: tokens of a row.
        width: of a head.
        backward: whether it makes gradients.
    """

    heads: int
    queries: int
    keys: int
    width: int
    backward: bool


Form = Product | Attention

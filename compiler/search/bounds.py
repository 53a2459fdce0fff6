"""What no plan of a way can be better than, from sums over the model alone.

A rank r of p computes its share T_r of every microbatch, m times. Where no rank holds several
stages, its first action waits for the forwards of all stages before it, and after its last backward
these run theirs; where weight gradients have programs of their own, the rank may have some left to
run meanwhile, so that only the forwards count. With f, the part of a microbatch that counts (1, or
the least part of a unit's seconds that is its forward), a step takes

    max over r of  m · T_r + f · (T_0 + … + T_(r−1))

however the W = Σ T_r seconds of a microbatch are divided. That is least where all of these are
equal, T_(r+1) = T_r · (1 − f / m), which makes it f · W / (1 − (1 − f / m)^p). Where ranks hold
several stages f is taken as 0, and the bound is m · W / p. Recomputation, transfers, uneven units
and what follows the last microbatch only add to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Microbatch:
    """Seconds of one.

    Attributes:
        whole_s: forward and backward of the whole model, nothing recomputed.
        largest_s: of its largest unit.
        forward: the least part of a unit's seconds that is its forward.
    """

    whole_s: float
    largest_s: float = 0.0
    forward: float = 0.0


def least_compute_s(one: Microbatch, m: int, ranks: int, virtual: int, splits: bool) -> float:
    """Seconds from the first action of a step to the last, at least.

    Args:
        m: microbatches of a replica.
        virtual: stages per rank.
        splits: whether weight gradients may be put off.
    """
    part = 0.0 if virtual > 1 else one.forward if splits else 1.0
    least_s = m * one.whole_s / ranks
    if part:
        shares = -math.expm1(ranks * math.log1p(-part / m)) if part < m else 1.0
        least_s = part * one.whole_s / shares
    return max(least_s, m * one.largest_s, one.whole_s if not splits else 0.0)

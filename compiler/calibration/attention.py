"""Seconds of fused attention, by length and head size.

Its FLOPs are counted without what a causal mask or a window leaves out. A kernel reaches a share
of the peak that grows with the length, as blocks on the diagonal are computed in full, and a row's
first and last blocks are as dear as the others, and with the head size, as there are more products
for each exponential.
"""

from __future__ import annotations

from dataclasses import dataclass

from .forms import Attention


@dataclass(frozen=True)
class Attentions:
    """What attention reaches.

    Attributes:
        forward, backward: of the peak, at heads of 128 and very many tokens.
        half_width: the size of heads at which it would be half of that at very large ones.
        half_tokens: the number of keys at which it is half of that.
    """

    forward: float
    backward: float
    half_width: float
    half_tokens: float

    def efficiency(self, form: Attention) -> float:
        """Of the peak of its dtype."""
        share = self.backward if form.backward else self.forward
        wide = form.width / (form.width + self.half_width) * (128 + self.half_width) / 128
        long = form.keys / (form.keys + self.half_tokens)
        return min(1.0, share * min(wide, 1.0) * long)

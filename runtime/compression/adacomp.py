"""Of each bin of a gradient the largest numbers alone, as signs times one scale per parameter.

Chen et al., "AdaComp: Adaptive Residual Gradient Compression for Data-Parallel Distributed
Training", AAAI 2018, algorithm 2. G is what was kept and the latest gradient together:

    G = kept + latest     H = G + latest     sent: where |H| is at least the largest |G| of its bin

So more is sent where a bin's numbers are alike or grow, and less where one stands out; H lets go
what would be the largest after one more such gradient. The scale is the mean of the bins' largest
|G|, of those bins that have any.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...compiler.compression.sizes import COUNT, FLOAT
from .exchange import Rounds, Share
from .packing import Kept, flat

SKIP = (1 << 15) - 1  # a word that stands for so many places without a number
NEGATIVE = 1 << 15


class AdaComp(Kept):
    """Of one rank.

    Args:
        width: how many numbers a bin has.
        grads: FQN -> where its gradient is, in fp32.
    """

    def __init__(self, width: int, grads: Mapping[str, torch.Tensor], dp: int, replica: int):
        super().__init__(width, grads)
        self._dp = dp
        spans = self._packing.spans.values()
        self._ends = torch.tensor([(at + n) * width for at, n in spans], device=self._kept.device)

    def mean_(self, scale: float) -> Rounds:
        """Replace the gradients by the mean of what replicas send of them.

        Args:
            scale: what they have been multiplied by.
        """
        data = self._taken(scale)
        count = torch.tensor([data.numel()]).view(torch.uint8).to(data.device)
        counts = yield Share(count, [COUNT] * self._dp)
        shared = yield Share(data, [int(each.cpu().view(torch.int64)) for each in counts])
        means = self._packing.zeros()
        for given in shared:
            places, values = self._read(given)
            means.view(-1)[places] += values
        self._packing.write(means.div_(self._dp), scale)

    def _taken(self, scale: float) -> torch.Tensor:
        """What is sent: all parameters' scales, and words; (bytes,)."""
        places, negative, scales = [], [], []
        for name, (first, count) in self._packing.spans.items():
            rows = self._kept[first : first + count]  # (bins, width)
            latest = torch.zeros_like(rows)
            own = latest.view(-1)[: self._grads[name].numel()]
            torch.mul(flat(self._grads[name]), 1 / scale, out=own)
            rows += latest
            largest = rows.abs().amax(1, keepdim=True) if rows.numel() else rows.new_zeros(0, 1)
            chosen = (latest.add_(rows).abs_() >= largest) & (rows != 0)
            size = largest.sum() / (largest > 0).sum().clamp(min=1)
            at = chosen.view(-1).nonzero().view(-1)
            below = rows.view(-1)[at] < 0
            rows.view(-1)[at] -= torch.where(below, -size, size)
            places.append(at + first * self._packing.width)
            negative.append(below)
            scales.append(size)
        words = pack(torch.cat(places), torch.cat(negative))
        return torch.cat([torch.stack(scales).view(torch.uint8), words.view(torch.uint8)])

    def _read(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places among all elements, and what is there."""
        border = len(self._grads) * FLOAT
        scales = data[:border].clone().view(torch.float32)
        places, negative = unpack(data[border:].clone().view(torch.int16))
        values = scales[torch.bucketize(places, self._ends, right=True)]
        return places, torch.where(negative, -values, values)


def pack(places: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Rising places, and whether what is there is negative, as words of 16 bits.

    A word has a sign and how many places are left out before it; `SKIP` stands for that many
    places and nothing.
    """
    before = torch.cat([places.new_full((1,), -1), places[:-1]]) if places.numel() else places
    gaps = places - before - 1
    skips = gaps // SKIP
    words = torch.full((int((skips + 1).sum()),), SKIP, dtype=torch.int32, device=places.device)
    words[(skips + 1).cumsum(0) - 1] = (gaps % SKIP + negative * NEGATIVE).to(torch.int32)
    return torch.where(words >= NEGATIVE, words - 2 * NEGATIVE, words).to(torch.int16)


def unpack(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack`."""
    wide = words.to(torch.int64) & (2 * NEGATIVE - 1)
    gaps = wide & SKIP
    skipped = gaps == SKIP
    places = torch.where(skipped, SKIP, gaps + 1).cumsum(0) - 1
    return places[~skipped], (wide >= NEGATIVE)[~skipped]

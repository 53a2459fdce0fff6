"""Gradients of matrices as products of two narrow ones.

Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", NeurIPS 2019, algorithms 1 and 2. M is a gradient, with what was kept of it; Q begins
where the last step's ended:

    P = mean of M·Q     P̂ = P, its columns orthonormal     Q = mean of Mᵀ·P̂     mean of M ≈ P̂·Qᵀ

and M - P̂·Qᵀ is kept. What is no matrix, or would not be smaller, travels as it is beside P.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch

from ...compiler.compression.sizes import chunks, low_rank
from .exchange import Mean, Rounds
from .packing import flat


class PowerSGD:
    """Of one rank.

    Args:
        rank: how many columns P and Q have at most.
        grads: FQN -> where its gradient is, in fp32.

    Attributes:
        residues: FQN -> what was not sent, in the parameter's form; of matrices alone.
        bases: FQN -> its Q, (columns, rank), the same on all replicas.
        held: the tensors that all of that lies in.
    """

    def __init__(self, rank: int, grads: Mapping[str, torch.Tensor], dp: int, replica: int):
        self._grads, self._dp = grads, dp
        forms = {name: low_rank(tuple(grad.shape), rank) for name, grad in grads.items()}
        self._forms = {name: form for name, form in forms.items() if form is not None}
        self.residues = {name: torch.zeros_like(grads[name]) for name in self._forms}
        self.bases = {
            name: _drawn(name, columns, k).to(grads[name].device)
            for name, (_, columns, k) in self._forms.items()
        }
        self.held = [*self.residues.values(), *self.bases.values()]

    def mean_(self, scale: float) -> Rounds:
        """Replace the gradients by the approximation of their mean.

        Args:
            scale: what they have been multiplied by.
        """
        rest = [grad for name, grad in self._grads.items() if name not in self._forms]
        for name in self._forms:
            self.residues[name].add_(self._grads[name], alpha=1 / scale)
        left = [self._matrix(name) @ self.bases[name] for name in self._forms]  # (rows, k)
        both, bucket = self._joined([*left, *(flat(grad) / scale for grad in rest)])
        yield Mean(bucket)
        for grad, mean in zip(rest, both[len(left) :], strict=True):
            torch.mul(mean, scale, out=flat(grad))
        axes = [torch.linalg.qr(mean).Q for mean in both[: len(left)]]
        right = [self._matrix(name).T @ axis for name, axis in zip(self._forms, axes, strict=True)]
        means, bucket = self._joined(right)  # (columns, k)
        if bucket.numel():
            yield Mean(bucket)
        for name, axis, mean in zip(self._forms, axes, means, strict=True):
            sent = (axis @ mean.T).view(self._grads[name].shape)
            self.residues[name].sub_(sent)
            self._grads[name].copy_(sent).mul_(scale)
            empty = mean.abs().amax(0) == 0  # would be empty for ever
            self.bases[name].copy_(torch.where(empty, self.bases[name], mean))

    def _matrix(self, name: str) -> torch.Tensor:
        rows, columns, _ = self._forms[name]
        return self.residues[name].reshape(rows, columns)

    def _joined(self, parts: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Copies of tensors in one bucket whose length the replicas divide, and that."""
        sizes = [part.numel() for part in parts]
        like = next(iter(self._grads.values()))
        bucket = like.new_zeros(chunks(sum(sizes), self._dp) * self._dp)
        places = torch.split(bucket[: sum(sizes)], sizes) if parts else ()
        views = [place.view(part.shape) for place, part in zip(places, parts, strict=True)]
        for view, part in zip(views, parts, strict=True):
            view.copy_(part)
        return views, bucket


def _drawn(name: str, columns: int, rank: int) -> torch.Tensor:
    """What Q begins with: the same on all replicas and stages."""
    chance = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(columns, rank, generator=chance)

"""What a rank holds between steps, whatever program runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..exchange.mesh import Mesh
from .gradients import WholeGradients
from .sharded import Shards


class RankState:
    """What a rank holds between steps, whatever program runs: tensors on its device.

    Attributes:
        params: FQN -> the whole parameter, of those that are kept whole.
        copies: FQN -> the whole copy in the compute dtype.
        shards: the parameters that replicas divide; None where they do not.
    """

    def __init__(
        self,
        rank: int,
        mesh: Mesh,
        device: torch.device,
        params: Mapping[str, torch.Tensor],
        buffers: dict[str, torch.Tensor],
        grads: WholeGradients,
        shards: Shards | None = None,
    ):
        self.rank, self.mesh, self.device = rank, mesh, device
        self.params = dict(params)
        self.buffers, self.grads, self.shards = buffers, grads, shards
        self.copies: dict[str, torch.Tensor] = {}

    @property
    def stage(self) -> int:
        return self.mesh.stage_of(self.rank)

    def peer(self, stage: int) -> int:
        """The rank of another stage in the same replica."""
        return self.mesh.rank_of(self.mesh.replica_of(self.rank), stage)

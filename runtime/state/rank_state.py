"""What a rank holds between steps, whatever program runs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from ...compiler.ir.shards import Owners
from ..recording.log import RankLog
from ..transport.transport import Endpoint
from .gradients import WholeGradients
from .reached import Reached
from .sharded import Shards


class RankState:
    """Tensors of a rank's stages, on its device.

    Attributes:
        params: FQN -> the whole parameter, of those that are kept whole.
        copies: FQN -> the whole copy in the compute dtype.
        shards: the parameters that replicas divide; None where they do not.
        owners: of the parameters that one replica has all rows of.
        reached: which parameters of regions a step's gradients have reached.
        log: where the executor notes what it does; None where nobody records it.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        params: Mapping[str, torch.Tensor],
        buffers: dict[str, torch.Tensor],
        grads: WholeGradients,
        shards: Shards | None = None,
        owners: Owners = MappingProxyType({}),
    ):
        self.endpoint = endpoint
        self.params = dict(params)
        self.buffers, self.grads, self.shards, self.owners = buffers, grads, shards, owners
        self.copies: dict[str, torch.Tensor] = {}
        self.reached = Reached()
        self.log: RankLog | None = None

    @property
    def rank(self) -> int:
        return self.endpoint.rank

    @property
    def device(self) -> torch.device:
        return self.endpoint.device

    @property
    def stages(self) -> tuple[int, ...]:
        return self.endpoint.stages

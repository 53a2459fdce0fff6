"""dp × pp: which process holds which stages of which replica."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist

from ...compiler.costs.topology import ORDERS, Numbering
from ...compiler.ir.errors import WorldSizeError
from .joining import TIMEOUT_S, join

Placement = tuple[tuple[int, ...], ...]
"""Per rank of a replica, the stages that it holds."""


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run.

    Attributes:
        dp: how many replicas there are.
        rank: this process's rank; None where one process plays all ranks.
        n_stages: into which the model is divided.
        placement: where it is left out, each rank holds one stage, in order.
        order: what ranks that are neighbours in number have in common (`Numbering`).
    """

    n_stages: int
    dp: int
    rank: int | None
    placement: Placement = ()
    order: str = ORDERS[0]

    @cached_property
    def numbering(self) -> Numbering:
        return Numbering(self.pp, self.dp, self.order)

    @property
    def pp(self) -> int:
        """How many ranks a replica has."""
        return len(self.placement) or self.n_stages

    @property
    def size(self) -> int:
        return self.pp * self.dp

    @property
    def distributed(self) -> bool:
        return self.rank is not None

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """The ranks that this process plays."""
        return tuple(range(self.size)) if self.rank is None else (self.rank,)

    def replica_of(self, rank: int) -> int:
        return self.numbering.replica_of(rank)

    def position_of(self, rank: int) -> int:
        """Which of the ranks of its replica it is."""
        return self.numbering.position_of(rank)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        position = self.position_of(rank)
        return self.placement[position] if self.placement else (position,)

    def rank_of(self, replica: int, stage: int) -> int:
        """The rank that holds a stage in a replica."""
        return self._ranks[replica, stage]

    @cached_property
    def _ranks(self) -> dict[tuple[int, int], int]:
        """(replica, stage) -> the rank that holds it."""
        placement = self.placement or [(stage,) for stage in range(self.n_stages)]
        return {
            (replica, stage): self.numbering.rank_of(replica, position)
            for position, stages in enumerate(placement)
            for stage in stages
            for replica in range(self.dp)
        }

    def replicas_of(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold a stage, one per replica."""
        return tuple(self.rank_of(replica, stage) for replica in range(self.dp))

    def channel(self, src: int, dst: int) -> int:
        """The number of what one stage sends to another, in every replica."""
        return src * self.n_stages + dst

    def peers_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same stages as this one, one per replica."""
        return self.numbering.peers_of(self.position_of(rank))


def world_size() -> int:
    """The number of processes of this run; 0 where it was started as a single one."""
    if dist.is_initialized():
        return dist.get_world_size()
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return 0


def make_mesh(pp: int, dp: int, placement: Placement = (), order: str = ORDERS[0]) -> Mesh:
    """The mesh that fits how this process was started: torchrun, or plain python.

    Args:
        pp: ranks of a replica.
        placement: of stages on them.
        order: of the ranks.

    Raises:
        WorldSizeError: started as a number of processes that is not pp × dp.
    """
    world = world_size()
    n_stages = sum(map(len, placement)) or pp
    if not world:
        return Mesh(n_stages, dp, None, placement, order)
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])
    if world != pp * dp:
        raise WorldSizeError(
            f"n_stages={pp} × dp={dp} needs {pp * dp} processes, and there are "
            f"{world}: start it with torchrun --nproc-per-node {pp * dp}, or choose "
            f"n_stages and dp whose product is {world}"
        )
    return Mesh(n_stages, dp, rank, placement, order)


def connect(mesh: Mesh, device: torch.device, timeout_s: float = TIMEOUT_S) -> None:
    """Join the other processes, unless the script has already done so.

    Raises:
        PeerFailedError: a rank does not come within some seconds.
    """
    if not mesh.distributed:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    join("nccl" if device.type == "cuda" else "gloo", timeout_s)

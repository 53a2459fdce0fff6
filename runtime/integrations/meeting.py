"""What the ranks of a Trainer tell each other beside the steps of its pipeline."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..pipeline import Pipeline


class Meeting:
    """Attributes:
    pipe: the pipeline, once it is there: its ranks compare what they meet for, and name the one
        that is waited for.
    """

    pipe: Pipeline | None = None

    def gather(self, value: Any, what: str) -> list[Any]:
        """This value of every process, in rank order. A collective.

        Args:
            what: what it is for, as an error says it; the same on all ranks.

        Raises:
            RankMismatchError: a rank is in another call.
        """
        if self.pipe is not None:
            world = self.pipe._world
            with world.guard(what):
                return world.agreement.gather(value)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return [value]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, value)
        return everyone

    def draw_alike(self) -> None:
        """Torch's random state becomes that of rank 0, on every rank: collators of replicas draw
        for batches of other sizes, and the next epoch's order has to be the same."""
        main = not dist.is_initialized() or dist.get_rank() == 0
        state = torch.random.get_rng_state() if main else None
        torch.random.set_rng_state(self.gather(state, "an iteration over a Trainer's loader")[0])

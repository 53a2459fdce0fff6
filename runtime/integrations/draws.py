"""Random states of a process: kept while something is peeked at, and made those of rank 0."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """What is drawn inside is drawn again afterwards."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numbers)


def agree() -> None:
    """Torch's random state becomes that of rank 0, on every rank: collators of replicas draw for
    batches of other sizes, and the next epoch's order has to be the same. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    states = [torch.random.get_rng_state() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(states, src=0)
    assert states[0] is not None
    torch.random.set_rng_state(states[0])

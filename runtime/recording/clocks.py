"""How far the clocks of processes are apart."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from ..transport.mesh import Mesh

ROUNDS = 10


def ahead_ns(mesh: Mesh, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """By how many nanoseconds `time.perf_counter_ns` of this rank is ahead of rank 0's, and how
    wrong that may be.

    Every rank in turn asks rank 0 for its time, some times over; the quickest answer tells most,
    and what half of its round trip may explain is no difference: processes of one machine have
    one clock. A collective: every rank calls it.

    Args:
        group: over gloo, with nothing under way; None for the default one.
    """
    if mesh.rank is None or mesh.size == 1:
        return 0, 0
    found = (0, 0)
    for rank in range(1, mesh.size):
        if mesh.rank == 0:
            for _ in range(ROUNDS):
                dist.recv(torch.empty(1, dtype=torch.int64), rank, group=group)
                dist.send(torch.tensor([time.perf_counter_ns()]), rank, group=group)
        elif mesh.rank == rank:
            found = _asked(group)
    return found


def _asked(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """The other end of it."""
    answers = []
    for _ in range(ROUNDS):
        theirs = torch.empty(1, dtype=torch.int64)
        start = time.perf_counter_ns()
        dist.send(theirs.zero_(), 0, group=group)
        dist.recv(theirs, 0, group=group)
        end = time.perf_counter_ns()
        answers.append((end - start, (start + end) // 2 - int(theirs)))
    trip, ahead = min(answers)
    return (0 if abs(ahead) <= trip // 2 else ahead), trip // 2

"""What a rank reports of its part of a run, with messages that are sent anyway."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch

from ...compiler.costs.topology import Numbering


class Report(NamedTuple):
    """Of one rank and one run; NaN where a number is not known.

    Attributes:
        busy_s: its programs took.
        span_s: from the first of them to the end of the last.
        sent_bytes: values and gradients that it has sent other ranks.
        peak_bytes: the most that torch has held on its device, since the process began.
    """

    busy_s: float
    span_s: float
    sent_bytes: float
    peak_bytes: float


def report_of(
    device: torch.device, spans_s: Sequence[tuple[float, float]], sent_bytes: int
) -> Report:
    """Of this process.

    Args:
        spans_s: per rank that it plays, how long its programs took, and from when to when they
            ran, by the host's clock: what ranks of one process did says nothing of ranks beside
            each other, and a CUDA device computes later.
    """
    alone = len(spans_s) == 1 and device.type != "cuda"
    busy_s, span_s = spans_s[0] if alone else (math.nan, math.nan)
    return Report(busy_s, span_s, float(sent_bytes), peak_of(device))


def peak_of(device: torch.device) -> float:
    """Bytes; NaN on the CPU, whose allocator keeps no count."""
    with suppress(RuntimeError):
        if device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(device))
    return math.nan


def bubble_of(runs: Iterable[Sequence[Report]], ranks_of: Numbering) -> float | None:
    """The share of the ranks' time in which nothing was computed, as `Timeline.bubble` has it; over
    all replicas, which begin together. None where that was not measured.

    Args:
        runs: of each, the reports of all ranks, in order.
        ranks_of: the replicas.
    """
    busy = whole = 0.0
    for ranks in runs:
        spans: list[list[float]] = [[] for _ in range(ranks_of.dp)]
        for rank, each in enumerate(ranks):
            spans[ranks_of.replica_of(rank)].append(each.span_s)
        whole += sum(max(replica) * len(replica) for replica in spans)
        busy += sum(each.busy_s for each in ranks)
    return 1 - busy / whole if whole > 0 else None

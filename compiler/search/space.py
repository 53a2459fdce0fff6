"""All ways to use some devices for one batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..driver.auto import Open, Way
from ..options.checks import ZERO
from ..options.options import CompileOptions
from ..options.parsing import AUTO

MOST_PER_STAGE = 64
"""Microbatches per stage: the bubble is below 2 % there, and every message costs its latency."""


def ways_of(open_: Open, options: CompileOptions, devices: int, rows: int) -> list[Way]:
    """Every combination of what is open: ranks and replicas, schedules with their stages per rank,
    levels of ZeRO, and microbatches. What options name stays as it is.

    Where divisions are held to limits that allow a single one, nothing is open but the schedule,
    and which ranks share a machine: it is used as the same division would be that options name.

    Args:
        rows: of the batch of all replicas.
    """
    ways = open_.ways(options, devices)
    one = len({replace(way, placement=None) for way in ways}) == 1
    if one and open_.stages is not None:
        return ways
    if not open_.divides and not open_.orders:  # the places of ranks alone
        return ways
    return [
        replace(way, zero=zero, microbatches=count)
        for way in ways
        for zero in _levels(options, way)
        for count in _counts(way, rows)
    ]


def _levels(options: CompileOptions, way: Way) -> tuple[int | None, ...]:
    if options.zero != AUTO:  # with one replica there is nothing to divide
        return (None,) if way.dp > 1 or options.zero == 0 else (0,)
    return ZERO if way.dp > 1 else (0,)


def _counts(way: Way, rows: int) -> Iterator[int]:
    """Of microbatches: all that leave them alike, with a power of two of rows each, or with all."""
    if way.microbatches is not None:
        yield way.microbatches
        return
    share = rows // way.dp
    if rows % way.dp:  # replicas differ by a row, whatever is done
        share += 1
    sizes = {1 << power for power in range(share.bit_length())} | {share}
    for size in sorted(size for size in sizes if share % size == 0):
        if share // size <= max(MOST_PER_STAGE * way.n_stages, 1):
            yield share // size

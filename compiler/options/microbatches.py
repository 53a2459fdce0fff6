"""Into how many microbatches a batch is cut, and of how many rows."""

from __future__ import annotations

from collections.abc import Sequence

from ..capture.batch import BatchSpec
from ..ir.errors import BatchError
from .options import CompileOptions

AIM = 4  # microbatches per stage: a bubble of about a fifth


def divide(
    spec: BatchSpec, options: CompileOptions, replicas: int, finer: int = 1
) -> tuple[BatchSpec, int]:
    """The spec of the largest microbatch, and the number of them per replica.

    Args:
        spec: of a batch that is cut over ``replicas`` first.
        finer: take so many times as many microbatches; where the options give their number, and
            where there are too few rows, that is refused.

    Raises:
        BatchError: there are no rows, or too few for ``finer``.
    """
    rows = cut(spec.rows, replicas)
    microbatches = microbatches_of(rows, options)
    if finer > 1:
        if options.microbatches is not None:
            raise BatchError(f"microbatches={options.microbatches} is given")
        microbatches *= finer
        if rows[0] % microbatches:
            raise BatchError(f"{rows[0]} rows are too few for {microbatches} microbatches")
    return spec.with_rows(cut(rows[0], microbatches)[0]), microbatches


def microbatches_of(rows: Sequence[int], options: CompileOptions) -> int:
    """The number of microbatches of every replica.

    Args:
        rows: of each replica.

    Raises:
        BatchError: there are none.
    """
    if not any(rows):
        raise BatchError("the batch has 0 rows: leave it out")
    return options.microbatches or choose_microbatches(max(rows), options.n_stages)


def pieces_per_replica(options: CompileOptions) -> int:
    """The number of microbatches of every replica, where a callable makes them."""
    return options.microbatches or (1 if options.n_stages == 1 else AIM * options.n_stages)


def cut(rows: int, parts: int) -> list[int]:
    """The rows of each of several parts, which differ by at most one; the larger come first."""
    least, more = divmod(rows, parts)
    return [least + 1] * more + [least] * (parts - more)


def choose_microbatches(rows: int, n_stages: int) -> int:
    """The divisor of a replica's batch nearest to so many per stage as there should be.

    One stage has no bubble to fill, so its batch is left whole.
    """
    if n_stages == 1:
        return 1
    aim = AIM * n_stages
    divisors = [d for d in range(1, rows + 1) if rows % d == 0]
    return min(divisors, key=lambda d: (max(d / aim, aim / d), -d))

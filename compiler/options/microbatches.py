"""Into how many microbatches a batch is cut."""

from __future__ import annotations

from ..capture.batch import BatchSpec
from ..ir.errors import BatchError
from .options import CompileOptions


def divide(
    spec: BatchSpec,
    options: CompileOptions,
    replicas: int,
    ragged: bool = False,
    finer: int = 1,
) -> tuple[BatchSpec, int]:
    """The spec of one microbatch, and the number of them per replica.

    Args:
        spec: of a batch that is cut over ``replicas`` first.
        ragged: take fewer microbatches where the rows do not divide, instead of refusing.
        finer: take so many times as many microbatches; where the options give their number, and
            where there are too few rows, that is refused.

    Raises:
        BatchError: it cannot be cut into equal parts.
    """
    if not spec.rows:
        raise BatchError("the batch has 0 rows: leave it out")
    if spec.rows % replicas:
        raise BatchError(
            f"a batch of {spec.rows} rows cannot be cut over dp={replicas} replicas: "
            f"use a multiple of {replicas} rows"
        )
    rows = spec.rows // replicas
    microbatches = options.microbatches or choose_microbatches(rows, options.n_stages)
    if finer > 1:
        if options.microbatches is not None:
            raise BatchError(f"microbatches={options.microbatches} is given")
        microbatches *= finer
    if ragged:
        microbatches = max(d for d in range(1, min(microbatches, rows) + 1) if rows % d == 0)
    if rows % microbatches:
        raise BatchError(
            f"a replica's batch of {rows} rows cannot be cut into microbatches={microbatches} of "
            f"equal size: use a multiple of {microbatches} rows, or another number of microbatches"
        )
    return spec.cut(replicas * microbatches), microbatches


def choose_microbatches(rows: int, n_stages: int) -> int:
    """The divisor of a replica's batch nearest to 4 per stage: a bubble of about a fifth.

    One stage has no bubble to fill, so its batch is left whole.
    """
    if n_stages == 1:
        return 1
    aim = 4 * n_stages
    divisors = [d for d in range(1, rows + 1) if rows % d == 0]
    return min(divisors, key=lambda d: (max(d / aim, aim / d), -d))

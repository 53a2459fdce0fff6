"""What would let a model fit into memory, with the numbers: answers of the solver to what-ifs."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from ...passes.partition.solve import solve
from ..ir.errors import MemoryBudgetError, PartitionError
from ..ir.problem import Problem, Solution
from ..options.options import CompileOptions
from .formulation import elsewhere, microbatches_of

MAX_STAGES = 64


def gib(number: float) -> str:
    """Bytes for people: in GiB, or in MiB where that is less than one."""
    if abs(number) < 2**30:
        return f"{number / 2**20:,.1f} MiB"
    return f"{number / 2**30:,.2f} GiB"


def advice(problem: Problem, nearest: Solution, options: CompileOptions, rows: int) -> list[str]:
    """Changes that help, each tried on the problem that did not fit.

    Args:
        nearest: the assignment that comes nearest to fitting.
        rows: of a microbatch.
    """
    found = []
    if options.remat != "auto":
        found.append(f'use remat="auto" instead of "{options.remat}", to recompute what it takes')
    stages = None if options.kind.fixed else _fewest_ranks(problem, options)
    if stages is not None:
        found.append(f"n_stages={stages} would fit")
    parts = [p for p in (2, 4, 8) if rows % p == 0]
    part = next((p for p in parts if _solved(_scaled(problem, 1 / p)) is not None), None)
    if part is not None:
        found.append(
            f"microbatches of 1/{part} the rows would fit: raise microbatches= {part}-fold"
        )
    held = max(_scaled(problem, 0.0).ranks_bytes(nearest.stage, nearest.option))
    found.append(
        f"give it more than memory={gib(problem.budget_bytes[0])} (of a stage's need, up to "
        f"{gib(held)} are weights, gradients and optimizer states)"
    )
    return found


def _fewest_ranks(problem: Problem, options: CompileOptions) -> int | None:
    """The fewest ranks above the present ones with which the model fits."""
    n, microbatches, virtual = problem.n_ranks, microbatches_of(problem), options.virtual
    top = min(problem.n_units // virtual, MAX_STAGES)
    tries = [n + 1, n + 2, *(k for k in (n * 3 // 2, 2 * n, 3 * n, 4 * n) if k > n + 2)]
    for count in (k for k in tries if k <= top):
        changed = elsewhere(problem, options.kind, count, microbatches, virtual)
        if _solved(changed) is not None:
            return count
    return None


def _scaled(problem: Problem, scale: float) -> Problem:
    """With microbatches of another size."""
    options = tuple(
        tuple(
            replace(
                option,
                stash_bytes=option.stash_bytes * scale,
                transient_bytes=option.transient_bytes * scale,
            )
            for option in menu
        )
        for menu in problem.options
    )
    kept = (replace(k, bytes=k.bytes * scale) if k.per_microbatch else k for k in problem.kept)
    return replace(problem, options=options, kept=tuple(kept))


def _solved(problem: Problem) -> Solution | None:
    with contextlib.suppress(MemoryBudgetError, PartitionError):
        return solve(problem, time_limit_s=5, solver="dynamic")
    return None

"""What would let a model fit into memory, with the numbers: answers of the solver to what-ifs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ...passes.partition.solve import solve
from ..compression.methods import Method
from ..compression.sizes import Table, rows_need, whole_bytes
from ..ir.errors import MemoryBudgetError, PartitionError
from ..ir.problem import Problem, Solution
from ..memory.footprint import Frozen
from ..memory.rank_memory import RankMemory
from ..options.options import CompileOptions
from .formulation import elsewhere, microbatches_of

MAX_STAGES = 64


_UNITS = (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1))


def freezing_note(found: Frozen, forward_s: float, backward_s: float, idle: Sequence[int]) -> str:
    """What frozen parameters save, in one line.

    Args:
        forward_s, backward_s: of one microbatch on all stages.
        idle: the stages below the first trained layer.
    """
    every = found.trained + found.frozen
    parts = [
        f"{found.trained:,} of {every:,} parameters are trained ({found.trained / every:.2%}): "
        f"{gib(found.grad_bytes)} of gradients and about {gib(found.state_bytes)} of optimizer "
        "states are not held"
    ]
    usual_s = 2 * forward_s  # of the products that a forward has, a backward has two each
    if forward_s and backward_s < usual_s:
        parts.append(
            f"a microbatch's backward takes {backward_s / usual_s:.0%} of what it would take about "
            f"(twice the forward), {(usual_s - backward_s) * 1e3:.3g} ms less"
        )
    if idle:
        several = "stages" if len(idle) > 1 else "stage"
        parts.append(
            f"no backward on {several} {', '.join(map(str, idle))}, below the first trained layer"
        )
    return "; ".join(parts)


def compression_note(method: Method, sent: int, plain: int, rows: bool) -> str:
    """What compression makes of the bytes that a rank gives other replicas per step.

    Args:
        rows: some are of tables of which rows travel, the most that these can take.
    """
    less = f"{plain / sent:.1f} times less" if sent < plain else "not less"
    estimated = method.name == "adacomp"
    told = "about " if estimated else "at most " if rows else ""
    first = "; in the first steps up to four times that" if estimated else ""
    whole = f"{told}{gib(sent)} instead of {gib(plain)} per step, {less}{first}"
    return f"gradients as {method}: {whole}"


def rows_note(tables: Mapping[str, Table], dp: int, stepped: Collection[str]) -> str:
    """What becomes of the gradients of tables of which rows travel, or are stepped, alone."""
    told = [
        f"{name!r}, at most {table.touched:,} of {table.rows:,} rows by a replica"
        for name, table in tables.items()
    ]
    parts = [f"rows that a step touches of {', '.join(told)}"]
    if dp > 1:
        sent = rows_need(list(tables.values()), dp).sent_bytes
        plain = sum(whole_bytes(table.bucket_bytes, dp) for table in tables.values())
        parts.append(
            f"a replica sends at most {gib(sent)} of them per step instead of {gib(plain)}"
        )
    if stepped:
        parts.append(
            f"the optimizer is given these alone of {', '.join(map(repr, sorted(stepped)))}"
        )
    return "; ".join(parts)


def gib(number: float) -> str:
    """Bytes for people: in the largest unit, up to GiB, of which it is one or more."""
    for unit, size, digits in _UNITS:
        if abs(number) >= size:
            return f"{number / size:,.{digits}f} {unit}"
    return f"{number:,.0f} bytes"


def parts_of(memory: RankMemory, stash_bytes: float) -> str:
    """What a rank's peak is made of: what it holds all the time, whatever is recomputed; what waits
    for backwards, which recomputing and smaller microbatches reduce; and the rest.

    Args:
        stash_bytes: of all microbatches that it holds at once, by the prices.
    """
    static = memory.static
    weights = static.weights + static.copies + static.grads + static.states
    others = static.buffers + static.constants + static.batch
    moving = memory.peak_bytes - static.total
    inside = bool(
        re.fullmatch(r"\d+[A-Z_]+\d+(\D.*)?", memory.peak_at)
    )  # a microbatch is under way
    stash = min(stash_bytes, moving) if inside else 0
    found = (
        (weights, "are weights, gradients and optimizer states"),
        (others, "buffers, constants and the batch"),
        (stash, "the stash of microbatches in flight"),
        (moving - stash, f"what {memory.peak_at} takes besides"),
        (memory.device_bytes, "what its device takes for itself"),
    )
    return ", ".join(f"{gib(size)} {what}" for size, what in found if size)


def advice(problem: Problem, nearest: Solution, options: CompileOptions, rows: int) -> list[str]:
    """Changes that help, each tried on the problem that did not fit.

    Args:
        nearest: the assignment that comes nearest to fitting.
        rows: of a microbatch.
    """
    found = []
    if options.remat != "auto":
        found.append(f'use remat="auto" instead of "{options.remat}", to recompute what it takes')
    free = not options.kind.fixed and len(set(problem.kinds)) == 1
    stages = _fewest_ranks(problem, options) if free else None
    if stages is not None:
        found.append(f"n_stages={stages} would fit")
    parts = [p for p in (2, 4, 8) if rows % p == 0]
    part = next((p for p in parts if _solved(_scaled(problem, 1 / p)) is not None), None)
    if part is not None:
        found.append(
            f"microbatches of 1/{part} the rows would fit: raise microbatches= {part}-fold"
        )
    found.append(f"give it more than memory={gib(min(problem.budget_bytes))}")
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

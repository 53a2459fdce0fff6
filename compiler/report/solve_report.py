"""How well public planning problems were solved: a row per graph, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from ...passes.partition.baselines import solve_uniform
from ...passes.partition.presolve import reduce
from ...passes.partition.solve import solve
from ..ir.errors import MemoryBudgetError, PartitionError
from ..ir.problem import Problem

_HEADS = ("graph", "nodes", "k", "objective", "bound", "proven", "seconds", "equal split", "by")


@dataclass(frozen=True)
class Outcome:
    """One graph.

    Attributes:
        objective, bound: None where nothing fits into memory.
        proven: the objective is the smallest there is, or nothing fits.
        equal_split: the objective of equal numbers of units per stage, memory apart.
        stage, option: per node.
    """

    graph: str
    nodes: int
    n_stages: int
    objective: float | None
    bound: float | None
    proven: bool
    seconds: float
    equal_split: float | None
    solver: str
    note: str
    stage: tuple[int, ...]
    option: tuple[int, ...]


def outcome_of(path: Path, problem: Problem, time_limit_s: float, solver: str) -> Outcome:
    """Solve a problem and its equal split."""
    size = (path.stem, problem.n_units, problem.n_stages)
    try:
        equal = solve_uniform(reduce(problem).problem).objective
    except PartitionError:
        equal = None
    try:
        found = solve(problem, time_limit_s=time_limit_s, solver=solver)
    except MemoryBudgetError as error:
        near = error.nearest
        return Outcome(
            *size, None, None, error.proven, near.seconds, equal, near.solver, str(error),
            near.stage, near.option,
        )  # fmt: skip
    return Outcome(
        *size, found.objective, found.bound, found.proven, found.seconds, equal, found.solver,
        found.note, found.stage, found.option,
    )  # fmt: skip


def write_outcomes(outcomes: Sequence[Outcome], stream: TextIO, *, as_json: bool) -> None:
    """A table in plain columns, notes below it; or a JSON list."""
    if as_json:
        stream.write(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
        return
    rows = [_HEADS, *(_row(outcome) for outcome in outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    for row in rows:
        first, *rest = (
            cell.ljust(width) if column in (0, 8) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        stream.write("  ".join([first, *rest]).rstrip() + "\n")
    for outcome in outcomes:
        if outcome.note:
            stream.write(f"{outcome.graph}: {outcome.note}\n")


def _row(outcome: Outcome) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.6g}"

    return (
        outcome.graph,
        str(outcome.nodes),
        str(outcome.n_stages),
        number(outcome.objective),
        number(outcome.bound),
        "yes" if outcome.proven else "no",
        f"{outcome.seconds:.2f}",
        number(outcome.equal_split),
        outcome.solver,
    )

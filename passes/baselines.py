"""The exact dynamic program over a chain of units, and the splits that people make by hand."""

from __future__ import annotations

from itertools import accumulate

from .partition import Problem, Solution


def solve_dynamic(problem: Problem) -> Solution:
    """The contiguous division with the smallest makespan, exactly.

    The makespan (m − 1) · max T + Σ T has two terms, so the program keeps, for every prefix of
    the units and number of stages, all (max, Σ) pairs that no other pair dominates.
    """
    n, stages = len(problem.unit_s), problem.n_stages
    before = [0.0, *accumulate(problem.unit_s)]
    cut_s = (0.0, *problem.cut_s[: n - 1], 0.0)  # nothing is sent after the last unit
    # front[k][j]: undominated (max T, Σ T, starts) of the first j units on k stages
    front: list[dict[int, list[tuple[float, float, tuple[int, ...]]]]] = [{0: [(0.0, 0.0, ())]}]
    for k in range(1, stages + 1):
        row: dict[int, list[tuple[float, float, tuple[int, ...]]]] = {}
        for end in range(k, n - (stages - k) + 1):
            found = [
                (
                    max(top, cost := before[end] - before[first] + cut_s[end]),
                    total + cost,
                    (*starts, first),
                )
                for first, states in front[-1].items()
                if first < end
                for top, total, starts in states
            ]
            row[end] = _undominated(found)
        front.append(row)
    best = min(front[-1][n], key=lambda state: (problem.microbatches - 1) * state[0] + state[1])
    return solution_of(problem, best[2])


def solve_uniform(problem: Problem) -> Solution:
    """Equal numbers of units per stage: what splitting by layer count does."""
    n, stages = len(problem.unit_s), problem.n_stages
    return solution_of(problem, tuple(s * n // stages for s in range(stages)))


def solution_of(problem: Problem, starts: tuple[int, ...]) -> Solution:
    ends = (*starts[1:], len(problem.unit_s))
    stages_s = tuple(problem.stage_s(a, b) for a, b in zip(starts, ends, strict=True))
    return Solution(starts, stages_s, problem.makespan_s(stages_s))


def _undominated(
    states: list[tuple[float, float, tuple[int, ...]]],
) -> list[tuple[float, float, tuple[int, ...]]]:
    kept: list[tuple[float, float, tuple[int, ...]]] = []
    for state in sorted(states):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept

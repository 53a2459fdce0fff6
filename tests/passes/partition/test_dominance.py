"""A unit is merged with a neighbour only where no solution gets worse."""

from __future__ import annotations

from pipecompile.compiler.ir.problem import Option, Problem, Value
from pipecompile.passes.partition import dominance
from pipecompile.passes.partition.presolve import reduce
from pipecompile.passes.partition.solve import solve


def test_constants_and_reshapes_are_merged() -> None:
    """0: matmul, 1: reshape of it, 2: matmul that reads that and a constant, 3."""
    options = tuple((Option(seconds),) for seconds in (3.0, 0.0, 4.0, 0.0))
    values = tuple(Value(u, (v,), 1.0, 1.0) for u, v in ((0, 1), (1, 2), (3, 2)))
    problem = Problem(options, ((0, 1), (1, 2), (3, 2)), 2, values)
    smaller = dominance.contract(reduce(problem))
    assert sorted(map(sorted, smaller.members)) in ([[0], [1, 2, 3]], [[0, 1], [2, 3]])
    assert solve(problem).objective == 5.0

"""Random faults, few: `make chaos` has as many as there is time for."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from support import chaos
from support.chaos import Fault


def test_a_seed_draws_the_same_faults_again() -> None:
    def first(seed: int) -> list[Fault]:
        return list(itertools.islice(chaos.drawn(seed, 4), 60))

    assert first(3) == first(3)
    assert first(3) != first(4)
    assert {fault.kind for fault in first(3)} == set(chaos.KINDS)
    assert {fault.rank for fault in first(3)} == {0, 1, 2, 3}


def test_curves_that_differ_are_told() -> None:
    assert chaos.compared({0: "a", 1: "b"}, {0: "a", 1: "b"}) == []
    assert chaos.compared({0: "a", 1: "c"}, {0: "a", 1: "b"}) == ["step 1: c and not b"]
    assert chaos.compared({0: "a"}, {0: "a", 1: "b"}) == ["steps [1] are in one curve alone"]


@pytest.mark.slow
def test_a_run_endures_random_faults(tmp_path: Path) -> None:
    """And ends with the curve of one that nothing happened to."""
    from bench.chaos import endure, ours

    assert endure(tmp_path, ours(tmp_path), 1.0, 6, 1) == 0
    assert list((tmp_path / "checkpoints").glob("step-*"))

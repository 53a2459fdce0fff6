"""Random faults, few: `make chaos` has as many as there is time for."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from support import chaos, hosts
from support.chaos import Fault


def test_a_seed_draws_the_same_faults_again() -> None:
    def first(seed: int) -> list[Fault]:
        return list(itertools.islice(chaos.drawn(seed, 4), 60))

    assert first(3) == first(3)
    assert first(3) != first(4)
    assert {fault.kind for fault in first(3)} == set(chaos.KINDS)
    assert {fault.rank for fault in first(3)} == {0, 1, 2, 3}
    cables = itertools.islice(chaos.drawn(3, 4, chaos.OF_NETWORKS), 60)
    assert {fault.kind for fault in cables} == set(chaos.OF_NETWORKS)


def test_curves_that_differ_are_told() -> None:
    assert chaos.compared({0: "a", 1: "b"}, {0: "a", 1: "b"}) == []
    assert chaos.compared({0: "a", 1: "c"}, {0: "a", 1: "b"}) == ["step 1: c and not b"]
    assert chaos.compared({0: "a"}, {0: "a", 1: "b"}) == ["steps [1] are in one curve alone"]


@pytest.mark.slow
def test_a_run_endures_random_faults(tmp_path: Path) -> None:
    """And ends with the curve of one that nothing happened to."""
    from bench.chaos import endure, ours

    faults = list(itertools.islice(chaos.drawn(1, 2), 6))
    assert endure(tmp_path, ours(tmp_path), 1.0, faults) == 0
    assert list((tmp_path / "checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("paused", "error"), ("stopped",), ("cut",)], ids="-".join)
def test_a_run_endures_each_kind(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """Of each there is one, of rank 1, when the run has begun again after the one before."""
    from bench.chaos import endure, ours

    network = "cut" in kinds
    if network and (reason := hosts.lacking()):
        pytest.skip(reason)
    faults = [Fault(kind, 1, 0.3, False, 1.5) for kind in kinds]
    assert endure(tmp_path, ours(tmp_path), 5.0, faults, network) == 0

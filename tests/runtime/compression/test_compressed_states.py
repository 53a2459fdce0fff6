"""Compressed gradients where replicas divide the optimizer's states (zero=1)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import compressing, plain
from support.compressing import METHODS
from support.gang import Gang
from support.matrix import quickly

CASES = [
    (method, n_stages, dp, by)
    for method in METHODS
    for n_stages, dp in ((1, 2), (2, 2), (1, 3))
    for by in ("rows", "matrices")
]


def trained(zero: int, method: str, n_stages: int, dp: int, **options: Any) -> tuple[Any, ...]:
    """Without clipping, whose norm is summed by rows where these are divided; (losses, state,
    residues)."""
    pipe = compressing.pipeline(method, n_stages, dp, zero=zero, **options)
    losses = [pipe.step(share) for share in compressing.shares(pipe, 3)]
    return losses, pipe.state_dict(), compressing.residues(pipe)


def save(folder: str, method: str) -> Any:
    pipe = compressing.pipeline(method, 1, 2, zero=1)
    for share in compressing.shares(pipe, 2):
        pipe.step(share)
    pipe.save(folder)
    losses = [pipe.step(share) for share in compressing.shares(pipe, 2, 2)]
    return losses, pipe.state_dict()


@pytest.mark.parametrize("method", quickly(["int8"], METHODS))
def test_parameters_and_what_is_kept_are_those_of_undivided_states(method: str) -> None:
    whole, divided = (trained(zero, method, 1, 2) for zero in (0, 1))
    for mine, theirs in zip(divided, whole, strict=True):
        assert plain.equal(mine, theirs)


@pytest.mark.parametrize(
    ("method", "n_stages", "dp", "by"), quickly([("int8", 2, 2, "rows")], CASES)
)
def test_processes_have_the_bits_of_one_that_plays_them(
    gang: Callable[[int], Gang], method: str, n_stages: int, dp: int, by: str
) -> None:
    options = {"zero": 1, "zero_by": by}
    mine = compressing.train(method, n_stages, dp, **options)
    found = gang(n_stages * dp).run(compressing.train, method, n_stages, dp, **options)
    for losses, state, _, kept, _ in found:
        assert plain.equal(losses, mine[0])
        assert plain.equal(state, mine[1])
        assert kept
        assert all(torch.equal(r, mine[3][key]) for key, r in kept.items())


@pytest.mark.parametrize("method", quickly(["powersgd:2"], METHODS))
def test_undivided_states_go_on_with_what_divided_ones_have_saved(
    gang: Callable[[int], Gang], method: str, tmp_path: Path
) -> None:
    (losses, state), *_ = gang(2).run(save, str(tmp_path), method)
    again, found, kept = compressing.resume(str(tmp_path), method, 1, 2)
    assert plain.equal(again, losses)
    assert plain.equal(found, state)
    assert any(residue.any() for residue in kept.values())


def test_plans_divide_states_and_hold_what_is_kept() -> None:
    plans = [compressing.pipeline("int8", 1, 2, zero=zero).plan for zero in (0, 1)]
    whole, divided = (plan.stages[0].memory for plan in plans)
    assert divided.residue == whole.residue > 0
    assert 0.45 < divided.states / whole.states < 0.6
    sent = dict(plans[1].notes)["compress"]
    assert "parameters besides" in sent
    seconds = [plan.stages[0].closing_s for plan in plans]
    exact = compressing.pipeline("off", 1, 2, zero=1).plan.stages[0].closing_s
    assert all(each > 0 for each in (*seconds, exact))

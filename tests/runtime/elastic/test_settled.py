"""Sessions with ``pin=``, ``cut=`` and ``plan=``: what is about one division, of several."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pipecompile import elastic, errors
from support.gang import Gang
from support.labelled import batch_of, loss_of
from torch import nn

FIRST = ["0.bias", "0.weight"]
PINNED = ["2.bias", "2.weight", "4.bias", "4.weight"]
FORWARD = {"n_stages": 2, "global_microbatches": 4}


def by_rows(batch: Any, pieces: int) -> list[Any]:
    """What is done without ``cut=``."""
    parts = {name: value.chunk(pieces) for name, value in batch.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(pieces)]


def compiled(**options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    model.traced_once = True  # type: ignore[assignment]
    return elastic.Session(memory=False).compile(
        model,
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        loss_fn=loss_of,
        seed=7,
        **{"example_batch": batch_of(0)} | options,
    )


def trained(**options: Any) -> tuple[str, list[torch.Tensor]]:
    """The division, and three losses."""
    pipe = compiled(**options)
    shards, shard = pipe.data_shards, pipe.data_shard
    losses = [pipe.step(batch_of(step, shards, shard)) for step in range(3)]
    plan = pipe.plan
    return f"{plan.n_stages} x {plan.dp} of {plan.microbatches}", losses


def stages_of(pipe: Any) -> list[list[str]]:
    return [sorted(stage.params) for stage in pipe.plan.stages]


def test_a_pin_holds_and_changes_no_bit() -> None:
    free, pinned = compiled(**FORWARD), compiled(pin={"2": 1}, **FORWARD)
    assert stages_of(pinned) == [FIRST, PINNED] != stages_of(free)
    losses = [[float(pipe.step(batch_of(step))) for step in range(3)] for pipe in (free, pinned)]
    assert losses[0] == losses[1]


def test_a_callable_cuts_the_batches_of_every_number_of_replicas(
    gang: Callable[[int], Gang],
) -> None:
    """In two processes two replicas of one stage, and in one process one."""
    options = {"n_stages": 1, "global_microbatches": 4}
    cut = gang(2).run(trained, cut=by_rows, **options)
    plain = gang(2).run(trained, **options)
    alone = trained(cut=by_rows, **options)
    assert [each[0] for each in (*cut, alone)] == ["1 x 2 of 2", "1 x 2 of 2", "1 x 1 of 4"]
    for ours, theirs in zip(cut, plain, strict=True):
        assert all(map(torch.equal, ours[1], theirs[1]))
    assert torch.stack(alone[1]).numpy() == pytest.approx(torch.stack(cut[0][1]).numpy(), rel=1e-5)


def test_a_plan_is_used_where_its_division_is_and_else_it_is_planned_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = compiled(pin={"2": 1}, **FORWARD).plan
    made.save(tmp_path / "plan.json")
    limits = {"n_stages": (1, 2), "global_microbatches": 4}
    again = compiled(plan=tmp_path / "plan.json", **limits).plan
    assert (again.n_stages, again.dp, again.decision) == (2, 1, made.decision)
    assert "planned anew" not in capsys.readouterr().err
    other = compiled(plan=made, devices=4, **FORWARD).plan
    assert (other.n_stages, other.dp) == (2, 2)
    said = "plan= is of 2 stages × dp 1 with 4 microbatches each, which is no division of 4"
    assert said in capsys.readouterr().err
    with pytest.raises(errors.OptionError, match=r"2 stages, which n_stages=\(3, 4\) never allows"):
        compiled(plan=made, n_stages=(3, 4))
    with pytest.raises(errors.OptionError, match="pin= has no effect beside plan="):
        compiled(plan=made, pin={"0": 0}, n_stages=2)


def test_what_needs_one_number_of_stages_says_so() -> None:
    for options, text in (
        ({"pin": {"0": 0}, "n_stages": (1, 2)}, r"pin= .* names stages.* n_stages=\(1, 2\): give"),
        ({"cut": by_rows, "n_stages": "auto"}, "cut= .*n_stages='auto': give one number"),
        ({"cut": by_rows, "n_stages": 1, "example_batch": None}, "needs example_batch="),
        ({"pin": {"0": 2}, "n_stages": 2}, "stages are 0 to 1"),
    ):
        with pytest.raises(errors.OptionError, match=text):
            compiled(**options)

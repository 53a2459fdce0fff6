"""Early stopping: one decision on every rank, whoever has the value."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.errors import OptionError
from pipecompile.runtime.stepping.early_stopping import EarlyStopping
from support import jobs, models
from support.gang import Gang


def alone(patience: int = 1, min_delta: float = 0.0, mode: str = "min") -> EarlyStopping:
    return EarlyStopping(lambda value: [value], patience, min_delta, mode)


def test_it_waits_as_long_as_it_is_told() -> None:
    stopping = alone(patience=2)
    assert [stopping.update(v) for v in (3.0, 2.0, 2.0, 2.5)] == [False] * 4
    assert stopping.update(torch.tensor(2.1))
    assert (stopping.best, stopping.waited, stopping.stopped) == (2.0, 3, True)


def test_a_little_better_is_not_better() -> None:
    stopping = alone(patience=0, min_delta=0.1, mode="max")
    assert not stopping.update(0.5)
    assert not stopping.update(0.7)
    assert stopping.improved
    assert stopping.update(0.75)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=False), max_size=12), st.integers(0, 3))
def test_min_and_max_mirror_each_other(values: list[float], patience: int) -> None:
    low, high = alone(patience), alone(patience, mode="max")
    for value in values:
        assert low.update(value) == high.update(-value)
    number = [value for value in values if not math.isnan(value)]
    assert low.best == (min(number) if number else None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"patience": -1},
        {"patience": 1.5},
        {"min_delta": -1},
        {"min_delta": math.nan},
        {"mode": "least"},
    ],
)
def test_options_that_are_none(wrong: Any) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        alone(**wrong)


def decisions(folder: Path) -> Any:
    """Rank 1 alone has the metric, then rank 0 has another one, then nobody has any."""
    pipe = jobs.pipeline("gpt2", 2, 1, 2, example_batch=models.batches("gpt2", 4, 1)[0])
    stopping = pipe.early_stopping(patience=1, mode="max")
    found = [stopping.update(None if pipe.is_main else value) for value in (0.5, 0.4)]
    pipe.save(folder)
    found.append(stopping.update(0.3 if pipe.is_main else 0.9))
    try:
        stopping.update(None)
    except OptionError as error:
        found.append(str(error))
    pipe.load(folder)
    found.append((stopping.best, stopping.waited, stopping.stopped))
    return found


def test_all_ranks_decide_alike(gang: Callable[[int], Gang], tmp_path: Path) -> None:
    for found in gang(2).run(decisions, tmp_path):
        assert found[:3] == [False, False, True]
        assert "None on every rank" in found[3]
        assert found[4] == (0.5, 1, False)


def test_a_loss_of_the_pipeline_stops_it() -> None:
    batch = models.batches("gpt2", 4, 1)[0]
    pipe = jobs.pipeline("gpt2", 2, 1, 2, example_batch=batch)
    stopping = pipe.early_stopping(patience=0)
    assert not stopping.update(pipe.evaluate(batch))
    assert stopping.update(pipe.evaluate(batch))  # nothing was trained in between
    with pytest.raises(OptionError, match="has a 'early_stopping' already"):
        pipe.early_stopping(patience=0)
    with pytest.raises(OptionError, match="given a str"):
        stopping.update("bad")

"""Losses as a picture of text."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipecompile import callbacks
from pipecompile.errors import OptionError
from pipecompile.runtime.monitor.curve import drawn


def told(losses: list[float], **sizes: int) -> Any:
    curve = callbacks.Curve(**sizes)
    for step, loss in enumerate(losses, 1):
        curve.on_step(None, SimpleNamespace(step=step, loss=loss))
    return curve


def test_what_falls_falls() -> None:
    assert str(told([4.0, 3.0, 2.0, 1.0], height=2)).splitlines() == [
        "4 ┤█▃  ",
        "1 ┤██▆▁",
        "   step 1 4",
    ]


def test_many_steps_are_means() -> None:
    lines = str(told([3.0, 1.0] * 50 + [0.0] * 100, width=2, height=1)).splitlines()
    assert lines == ["2 ┤█▁", "   step 1 200"]


def test_before_a_step_and_without_a_number() -> None:
    assert str(told([])) == "no steps yet"
    assert str(told([math.nan])) == "no finite loss"
    assert str(told([1.0, math.inf, 1.0], height=1)).splitlines()[0] == "1 ┤▁ ▁"


@pytest.mark.parametrize("sizes", [{"width": 0}, {"height": -1}, {"width": 2.0}])
def test_sizes_that_are_none(sizes: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(sizes))):
        callbacks.Curve(**sizes)


@given(
    st.lists(st.floats(allow_nan=True, width=32), min_size=1, max_size=40),
    st.integers(1, 30),
    st.integers(1, 6),
)
def test_it_has_its_size(values: list[float], width: int, height: int) -> None:
    lines = drawn(list(range(1, len(values) + 1)), values, width, height).splitlines()
    if len(lines) > 1:
        assert len(lines) == height + 1
        bodies = [line.partition("┤")[2] for line in lines[:-1]]
        assert {len(body) for body in bodies} == {min(width, len(values))}
        if width >= len(values):
            assert "▁" in bodies[-1]  # the least

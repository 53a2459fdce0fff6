"""Numbers for the symbols of a trace, and what has to hold for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.tensors.fakes import FakeTensorMode
from pipecompile.compiler.tracing.sizes import Sizes
from pipecompile.errors import CaptureError


def sizes(*shape: int, varying: Any = (0, 1)) -> tuple[Sizes, list[Any]]:
    """Of one leaf, and its shape in a trace."""
    made = Sizes(FakeTensorMode(), [shape], [varying])
    with made.traced():
        return made, list(made.leaf(0, torch.float32, torch.device("cpu")).shape)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 50), st.integers(2, 50), st.integers(2, 50), st.integers(2, 50))
def test_numbers_are_those_of_python(rows: int, length: int, more: int, longer: int) -> None:
    made, (a, b) = sizes(rows, length)

    def followed(a: Any, b: Any) -> list[Any]:
        return [a * b - 1, (a * b + 7) // 4, a % b, a / b, (a + b) ** 2, -a, torch.sym_max(a, 9)]

    found = made.at([(more, longer)])
    for mine, theirs in zip(followed(a, b), followed(more, longer), strict=True):
        assert found.value(mine) == theirs
        assert type(found.value(mine)) is type(theirs)
    assert found.shape((a, 3, b)) == (more, 3, longer)


def test_guards_hold() -> None:
    """A decision that no range can tell."""
    made, (a, b) = sizes(6, 4)
    assert bool(a * b > 20)
    made.at([(4, 6)])
    with pytest.raises(CaptureError, match=r"decides by .*, which is untrue"):
        made.at([(4, 5)])


def test_ranges_hold() -> None:
    made, (a, _) = sizes(6, 4)
    assert bool(a < 10)
    made.at([(9, 4)])
    with pytest.raises(CaptureError, match=r"sizes from 2 to 9, and not 12|is untrue"):
        made.at([(12, 4)])


def test_symbols_that_became_numbers() -> None:
    made, (a, _) = sizes(6, 4)
    assert int(a) == 6
    made.at([(6, 5)])
    with pytest.raises(CaptureError, match="made for a size of 6"):
        made.check_free()
    with pytest.raises(CaptureError, match="made for a size of 6, and not 7"):
        made.at([(7, 5)])


@pytest.mark.parametrize("shape", [(1, 4), (6, 0)])
def test_small_sizes_are_numbers(shape: tuple[int, int]) -> None:
    made, _ = sizes(6, 4)
    with pytest.raises(CaptureError, match="leaf 0 has"):
        made.at([shape])
    with pytest.raises(CaptureError, match="stands for no others"):
        sizes(*shape)


def test_what_does_not_vary_stays() -> None:
    made, (_, b) = sizes(6, 4, varying=(0,))
    assert b == 4
    with pytest.raises(CaptureError, match="leaf 0 has 5 in dimension 1"):
        made.at([(6, 5)])

"""Matrices of which a small part is quick."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quickly(chosen: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """All cases, for ``parametrize``: those chosen always run, the others are slow.

    Raises:
        AssertionError: one that is chosen is no case.
    """
    chosen, cases = list(chosen), list(cases)
    assert all(case in cases for case in chosen), chosen
    slow = pytest.mark.slow
    return [
        case if case in chosen else pytest.param(*_values(case), marks=slow, id=_name(case))
        for case in cases
    ]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)


def _name(case: Any) -> str | None:
    return None if isinstance(case, tuple) else str(case)

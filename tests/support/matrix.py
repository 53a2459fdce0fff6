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
    return [case if case in chosen else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)

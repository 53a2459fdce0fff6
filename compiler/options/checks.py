"""What one option's value must be, whatever the others are: each raises OptionError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..ir.errors import OptionError
from ..ir.zero import LEVELS

ZERO = tuple(zero.level for zero in LEVELS)


def check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise OptionError(f"{name}={value!r} must be an int")
    if value < 1:
        raise OptionError(f"{name}={value} must be at least 1")


def check_above_zero(name: str, value: Any) -> None:
    if not value > 0:
        raise OptionError(f"{name}={value} must be above 0")


def callable_or(advice: str) -> Callable[[str, Any], None]:
    """A check that gives advice where a value is not callable."""

    def check(name: str, value: Any) -> None:
        if not callable(value):
            raise OptionError(f"{name}={value!r} is not callable: {advice}")

    return check


def check_level(name: str, value: Any) -> None:
    if value != "auto" and (isinstance(value, bool) or value not in ZERO):
        raise OptionError(f'{name}={value!r}: use 0, 1, 2, 3 or "auto"')

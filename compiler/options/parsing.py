"""Texts -> values of options."""

from __future__ import annotations

import re

from ..ir.errors import OptionError
from . import checks

AUTO = "auto"
AS_IT_IS = "as it is"  # a plan's text for precision=None

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{prefix}i": 1 << 10 * (i + 1) for i, prefix in enumerate("kmgt")}


def parse_bytes(given: int | str, name: str) -> int:
    """Bytes from an int or from a text such as ``"20GiB"``, ``"512 MB"``.

    Raises:
        OptionError: neither, or not above 0.
    """
    match = re.fullmatch(r"([\d_.]+)\s*([kmgt]?i?)b?", str(given).strip().lower())
    if isinstance(given, bool) or match is None or match[2] not in _UNITS:
        raise OptionError(f'{name}={given!r}: give bytes, or a text such as "20GiB"')
    try:
        number = float(match[1]) * _UNITS[match[2]]
    except ValueError:
        raise OptionError(f'{name}={given!r}: give bytes, or a text such as "20GiB"') from None
    if number < 1:
        raise OptionError(f"{name}={given!r} must be above 0")
    return int(number)


def parse_count(text: str) -> int:
    """A whole number from 1 to `MOST`, or OptionError."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise OptionError(f"{text!r} is not a whole number above 0")
    if number > checks.MOST:
        raise OptionError(f"{text!r} is more than {checks.MOST}")
    return number


def parse_stages(text: str) -> int | str:
    """A whole number above 0 or "auto"; OptionError for neither."""
    return text if text == AUTO else parse_count(text)


def parse_seconds(text: str) -> float:
    """A number, or OptionError."""
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"{text!r} is not a number of seconds") from None


def parse_pin(text: str) -> tuple[str, int]:
    """A module's or parameter's name and its stage from ``lm_head=3``, or OptionError."""
    name, _, stage = text.rpartition("=")
    if not name or not stage.isdecimal():
        raise OptionError(f"{text!r}: write it as FQN=STAGE, like lm_head=3")
    return name, int(stage)


def parse_level(text: str) -> int | str:
    """A level of ZeRO; what is no number is left as it is."""
    return int(text) if text.isdigit() else text


def parse_dtype(text: str) -> str | None:
    """What ``precision`` takes, from a command line or a plan."""
    return None if text == AS_IT_IS else text


def parse_names(text: str) -> tuple[str, ...]:
    """Names that commas separate."""
    return tuple(name.strip() for name in text.split(","))

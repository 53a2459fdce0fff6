"""Texts -> values of options."""

from __future__ import annotations

import re
import warnings

from ..ir.errors import OptionError
from . import checks

AUTO = "auto"
AS_IT_IS = "as it is"  # a plan's text for precision=None

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
LEAST_BYTES = 1 << 12
"""Of a number without a unit: nothing can be trained in less than a page, so it is a slip."""
USUAL_BYTES = 1 << 17
"""Of a number without a unit: less may be one."""
_UNITS |= {f"{prefix}i": 1 << 10 * (i + 1) for i, prefix in enumerate("kmgt")}


def parse_bytes(given: int | str, name: str) -> int:
    """Bytes from an int or from a text such as ``"20GiB"``, ``"512 MB"``.

    Raises:
        OptionError: neither, or a number without a unit that no rank can do with, such as 20.
    """
    text = str(given).strip().lower()
    match = re.fullmatch(r"([\d_.]+)\s*([kmgt]?i?)b?", text)
    if isinstance(given, bool) or match is None or match[2] not in _UNITS:
        raise OptionError(f'{name}={given!r}: give bytes, or a text such as "20GiB"')
    try:
        number = float(match[1]) * _UNITS[match[2]]
    except ValueError:
        raise OptionError(f'{name}={given!r}: give bytes, or a text such as "20GiB"') from None
    if number < 1:
        raise OptionError(f"{name}={given!r} must be above 0")
    if not match[2] and not text.endswith("b") and number < LEAST_BYTES:
        unit = "bytes" if number > 1 else "byte"
        raise OptionError(
            f'{name}={given!r} is {number:g} {unit}: give it a unit, such as {name}="{match[1]}GiB"'
        )
    return int(number)


def check_memory(name: str, given: int | str) -> None:
    """Raises OptionError as `parse_bytes` does; warns of a number of bytes that is hardly meant."""
    number = parse_bytes(given, name)
    if number < USUAL_BYTES and str(given).strip().isdigit():
        warnings.warn(
            f'{name}={given} is {number / 1024:,.1f} KiB: if that is meant, write "{number} B"; '
            f'other units are KiB, MiB and GiB, as in {name}="20GiB"',
            stacklevel=2,
        )


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


def parse_truth(text: str) -> bool | str:
    """True or False; what is neither is left as it is."""
    return {"true": True, "false": False}.get(text.lower(), text)


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


def parse_chunks(text: str) -> int | str:
    """A number of tokens; what is no number is left as it is."""
    return int(text) if text.lstrip("-").isdigit() else text


def parse_dtype(text: str) -> str | None:
    """What ``precision`` takes, from a command line or a plan."""
    return None if text == AS_IT_IS else text


def parse_names(text: str) -> tuple[str, ...]:
    """Names that commas separate."""
    return tuple(name.strip() for name in text.split(","))


def precision_in_plan(given: object) -> str:
    from ..ir.precision import parse_precision  # imports torch

    return str(parse_precision(given) or AS_IT_IS)

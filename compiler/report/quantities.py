"""Numbers as people read them: a few digits and a unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_DECIMAL = ("", "K", "M", "G", "T", "P")
_BINARY = ("", "Ki", "Mi", "Gi", "Ti")
_SECONDS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


@dataclass(frozen=True)
class Scale:
    """One unit for all numbers of a column."""

    unit: str
    size: float
    digits: int

    def text(self, number: float) -> str:
        return f"{number / self.size:,.{self.digits}f}"


def bytes_scale(numbers: Sequence[float]) -> Scale:
    """The unit of the largest."""
    return _scale(numbers, 1024, "B", _BINARY)


def flops_scale(numbers: Sequence[float]) -> Scale:
    return _scale(numbers, 1000, "FLOP", _DECIMAL)


def count_scale(numbers: Sequence[float]) -> Scale:
    return _scale(numbers, 1000, "", _DECIMAL[:3])


def seconds_scale(numbers: Sequence[float]) -> Scale:
    """Milliseconds as long as they have a few digits."""
    most = max(numbers, default=0.0)
    unit, size = next((x for x in _SECONDS if most >= x[1]), _SECONDS[-1])
    return Scale(unit, size, 2)


def bytes_text(number: float) -> str:
    scale = bytes_scale([number])
    return f"{scale.text(number)} {scale.unit}"


def flops_text(number: float) -> str:
    scale = flops_scale([number])
    return f"{scale.text(number)} {scale.unit}"


def seconds_text(number: float) -> str:
    scale = seconds_scale([number])
    return f"{scale.text(number)} {scale.unit}"


def rate_text(number: float) -> str:
    """Three digits: 1,230 and 0.0123."""
    return f"{float(f'{number:.3g}'):,.0f}" if number >= 100 else f"{number:.3g}"


def counted(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("h") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def _scale(numbers: Sequence[float], base: int, unit: str, prefixes: Sequence[str]) -> Scale:
    most = max(map(abs, numbers), default=0)
    power = 0
    while power + 1 < len(prefixes) and most >= base ** (power + 1):
        power += 1
    digits = 0 if not power else 2 if prefixes[power] in ("Gi", "Ti") else 1
    return Scale(prefixes[power] + unit, float(base**power), digits)

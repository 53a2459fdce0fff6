"""A picture of a training as text: its losses over its steps."""

from __future__ import annotations

import math
from typing import Any

from ...compiler.ir.errors import OptionError
from .callbacks import Callback
from .metrics import Metrics

_PARTS = " ▁▂▃▄▅▆▇█"  # of a character's height, in eighths


class Curve(Callback):
    """Keeps the loss of every step, and draws them: ``print(curve)``, on rank 0.

    Reading a loss waits for the device.

    Args:
        width, height: in characters, without the labels.

    Raises:
        OptionError: a size is no number of characters above 0.
    """

    def __init__(self, width: int = 64, height: int = 8):
        for name, value in (("width", width), ("height", height)):
            if type(value) is not int or value < 1:
                raise OptionError(
                    f"Curve({name}={value!r}): give a number of characters, 1 or more"
                )
        self._width, self._height = width, height
        self._steps: list[int] = []
        self._losses: list[float] = []

    def on_step(self, pipe: Any, metrics: Metrics) -> None:
        self._steps.append(metrics.step)
        self._losses.append(metrics.loss)

    def __str__(self) -> str:
        if not self._losses:
            return "no steps yet"
        return drawn(self._steps, self._losses, self._width, self._height)


def drawn(steps: list[int], values: list[float], width: int, height: int) -> str:
    """Means of neighbouring steps as columns, between their least and their largest.

    Args:
        steps: numbers of the steps, as many as values.
        values: those that are not finite are left out.
        width, height: in characters; a column per step, where there are fewer.
    """
    width = min(width, len(values))
    means = [
        _mean(values[len(values) * i // width : len(values) * (i + 1) // width])
        for i in range(width)
    ]
    known = [mean for mean in means if mean is not None]
    if not known:
        return "no finite loss"
    low, high = min(known), max(known)
    eighths = [
        0 if mean is None else 1 + round((8 * height - 1) * (mean - low) / ((high - low) or 1.0))
        for mean in means
    ]
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"][:height]
    margin = max(map(len, labels))
    rows = [
        f"{label:>{margin}} ┤{_row(eighths, height - 1 - row)}" for row, label in enumerate(labels)
    ]
    first, last = f"step {steps[0]}", str(steps[-1])
    gap = max(1, width - len(first) - len(last))
    return "\n".join([*rows, " " * (margin + 2) + first + " " * gap + last])


def _row(eighths: list[int], below: int) -> str:
    """Of columns so high, what is in a row that has so many below it."""
    return "".join(_PARTS[min(8, max(0, n - 8 * below))] for n in eighths)


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None

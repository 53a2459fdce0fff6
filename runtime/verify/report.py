"""What was compared with one process, and the first thing that differs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

Tensors = Mapping[str, torch.Tensor]
NOISE = 1e-3
"""Of the largest value of all tensors: where rounding may differ, smaller ones may be nothing else,
as the gradient of a key's bias in attention is."""


@dataclass(frozen=True)
class Row:
    """Of one step and one kind of value.

    Attributes:
        what: "loss", "gradients", ...
        count: how many tensors were compared.
        differ: names of those whose bits differ -> the largest difference, relative to the largest
            value.
        wrong: those of them that are out of tolerance.
    """

    step: int
    what: str
    count: int
    differ: Mapping[str, float]
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        if not self.differ:
            return "identical to the last bit"
        worst = max(self.differ.values())
        return f"{len(self.differ)} of {self.count} differ, by {worst:.1e} at most"


@dataclass
class Report:
    """All that was compared.

    Args:
        model: to say where a parameter is used.
        tolerance: what may differ, relative to the largest value of a tensor; 0 for nothing.
        why: what makes it more than 0.
    """

    model: nn.Module
    tolerance: float = 0.0
    why: str = ""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def allow(self, tolerance: float, why: str) -> None:
        """From now on so much may differ."""
        self.tolerance = max(self.tolerance, tolerance)
        if why not in self.why:
            self.why = "; ".join(filter(None, (self.why, why)))

    def compare(
        self,
        step: int,
        what: str,
        found: Tensors,
        expected: Tensors,
        tolerance: float | None = None,
    ) -> None:
        """Add a row, in the order of what is expected."""
        limit = self.tolerance if tolerance is None else tolerance
        least = NOISE * max(map(_largest, expected.values()), default=0.0) if limit else 0.0
        differ = {
            name: _difference(found.get(name), value, least)
            for name, value in expected.items()
            if not _same(found.get(name), value)
        }
        differ |= dict.fromkeys(found.keys() - expected.keys(), math.inf)
        wrong = tuple(name for name, difference in differ.items() if not difference <= limit)
        self.rows.append(Row(step, what, len(expected), differ, wrong))

    @property
    def wrong(self) -> Row | None:
        """The first row with something out of tolerance."""
        return next((row for row in self.rows if row.wrong), None)

    def summary(self) -> str:
        """A line per row, and what was not compared."""
        if not self.rows:
            return ""
        lines = [f"step {row.step}  {row.what:12}  {row}" for row in self.rows]
        if self.tolerance:
            lines.append(f"differences of {self.tolerance:.0e} are allowed: {self.why}")
        return "\n".join([*lines, *self.notes])

    def difference(self) -> str:
        """What differs first: its name, by how much, and where it belongs."""
        row = self.wrong
        assert row is not None
        name = row.wrong[0]
        amount = row.differ[name]
        by = "is on one side only" if math.isinf(amount) else f"differs by {amount:.1e}"
        others = f" (and {len(row.wrong) - 1} more)" if len(row.wrong) > 1 else ""
        return f"step {row.step}, {row.what}: {name!r} {by}{others}{self._place(row, name)}"

    def _place(self, row: Row, name: str) -> str:
        if row.what not in ("gradients", "parameters", "buffers"):
            return ""
        path, _, _ = name.rpartition(".")
        try:
            part = self.model.get_submodule(path)
            file, line = inspect.getsourcefile(type(part)), inspect.getsourcelines(type(part))[1]
        except (AttributeError, OSError, TypeError):
            return ""
        return f"; it is of {type(part).__name__} {path!r} ({file}:{line})"


def _same(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    here = found.detach().cpu(), expected.detach().cpu()
    return torch.equal(*here) or bool(torch.allclose(*here, rtol=0, atol=0, equal_nan=True))


def _largest(tensor: torch.Tensor) -> float:
    return float(_wide(tensor).abs().max()) if tensor.numel() else 0.0


def _difference(found: torch.Tensor | None, expected: torch.Tensor, least: float) -> float:
    """Relative to the largest value, or to what is no noise."""
    if found is None or found.shape != expected.shape:
        return math.inf
    one, other = (_wide(tensor) for tensor in (found, expected))
    scale = max(float(other.abs().max()) if other.numel() else 0.0, least)
    return float((one - other).abs().max()) / (scale or 1.0)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().cpu().to(dtype)

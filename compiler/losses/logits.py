"""The arithmetic of a loss over classes, a piece of its logits at a time (`pieces`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ALIGNED = 64  # classes of a piece are a multiple: kernels like them
USUAL_ELEMENTS = 1 << 25  # of a piece, where nobody says how many rows


@dataclass(frozen=True)
class Chunks:
    """What is wanted of a graph's losses.

    Attributes:
        rows: as many logits exist at once as so many tokens have; 0 for what is usual.
        asked: a user gave the number.
    """

    rows: int = 0
    asked: bool = False


def usual_rows(classes: int) -> int:
    """How many tokens have about `USUAL_ELEMENTS` logits; a power of two."""
    return 1 << max(0, (USUAL_ELEMENTS // max(1, classes)).bit_length() - 1)


def piece_classes(tokens: int, classes: int, rows: int) -> int:
    """Of how many classes a piece of all tokens has no more logits than ``rows`` tokens, about."""
    pieces = max(1, -(-tokens // rows))
    least = -(-classes // pieces)
    return min(classes, -(-least // ALIGNED) * ALIGNED)


@dataclass(frozen=True)
class Step:
    """What is done to each logit.

    Attributes:
        name: "to" a dtype, "mul" or "div" by a number, "tanh", "add" the offset of its class.
        value: the dtype or the number, as text.
    """

    name: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.value}" if self.value else self.name

    @property
    def dtype(self) -> torch.dtype:
        found = getattr(torch, self.value)
        assert isinstance(found, torch.dtype)
        return found


def steps_of(text: str) -> list[Step]:
    """Steps from one text: ``"to:float32 div:30.0 tanh mul:30.0"``."""
    return [Step(name, value) for name, _, value in (each.partition(":") for each in text.split())]


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """In which losses are computed."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@dataclass(frozen=True)
class Head:
    """What makes logits.

    Attributes:
        weight: (classes, width).
        bias: (classes,), added by the product.
        offset: with an element for each class, added by a step.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    offset: torch.Tensor | None
    steps: Sequence[Step]

    @property
    def last(self) -> torch.dtype:
        """The dtype of logits after the steps."""
        dtypes = [step.dtype for step in self.steps if step.name == "to"]
        return dtypes[-1] if dtypes else self.weight.dtype

    def pieces(self, tokens: int, rows: int) -> Iterator[slice]:
        classes = self.weight.shape[0]
        size = piece_classes(tokens, classes, rows)
        for start in range(0, classes, size):
            yield slice(start, min(classes, start + size))

    def logits(self, hidden: torch.Tensor, at: slice, saved: list[Any] | None) -> torch.Tensor:
        """Those of some classes (tokens, piece), wide, in memory of their own.

        Args:
            saved: gets what `back` takes; None where nothing goes back.
        """
        bias = None if self.bias is None else self.bias[at]
        x = torch.nn.functional.linear(hidden, self.weight[at], bias)
        for step in self.steps:
            kept: Any = x.dtype if step.name == "to" else None
            if step.name == "to":
                x = x.to(step.dtype)
            elif step.name == "tanh":
                x = x.tanh_()
                kept = x.clone() if saved is not None else None
            elif step.name == "add":
                assert self.offset is not None
                x = x.add_(self.offset.reshape(-1)[at])
            else:
                x = x.mul_(float(step.value)) if step.name == "mul" else x.div_(float(step.value))
            if saved is not None:
                saved.append(kept)
        return x.to(wide_of(x.dtype))

    def back(self, grad: torch.Tensor, saved: list[Any]) -> torch.Tensor:
        """The gradient of the product's results, of that of logits; both may be one's memory."""
        grad = grad.to(self.last)
        for step, kept in zip(reversed(self.steps), reversed(saved), strict=True):
            if step.name == "to":
                grad = grad.to(kept)
            elif step.name == "tanh":
                grad = grad.mul_(kept.square_().neg_().add_(1))
            elif step.name != "add":
                value = float(step.value)
                grad = grad.mul_(value) if step.name == "mul" else grad.div_(value)
        return grad


@dataclass(frozen=True)
class Labels:
    """Flat labels, and what they count.

    Attributes:
        kept: which of them are not ignored.
        safe: a class for each, the first one for those that are ignored.
        weight: of each class, wide; None where all count as much.
        smoothing: what part of each label is spread over all classes.
    """

    kept: torch.Tensor
    safe: torch.Tensor
    weight: torch.Tensor | None
    smoothing: float
    classes: int

    @staticmethod
    def of(
        labels: torch.Tensor,
        weight: torch.Tensor | None,
        wide: torch.dtype,
        ignore_index: int,
        smoothing: float,
        classes: int,
    ) -> Labels:
        flat = labels.reshape(-1)
        kept = flat != ignore_index
        safe = flat.where(kept, 0).long()
        return Labels(kept, safe, None if weight is None else weight.to(wide), smoothing, classes)

    def check(self) -> None:
        """Raises IndexError where a label is no class; elsewhere than on a CPU, where nobody waits
        for values, a kernel refuses it as that of cross-entropy would."""
        if self.safe.device.type != "cpu":
            self.safe.new_empty(self.classes).index_select(0, self.safe)
        elif self.safe.numel():
            for found in (int(self.safe.min()), int(self.safe.max())):
                if not 0 <= found < self.classes:
                    raise IndexError(f"Target {found} is out of bounds.")

    def of_label(self, each: torch.Tensor) -> torch.Tensor:
        """A number for each token, times what its label counts."""
        each = each * (1 - self.smoothing)
        return each if self.weight is None else each * self.weight[self.safe]

    @property
    def of_all(self) -> float | torch.Tensor:
        """What all classes count together."""
        return float(self.classes) if self.weight is None else self.weight.sum()

    def spread(self, logits: torch.Tensor, at: slice) -> torch.Tensor:
        """Sums over the classes of a piece, each times what it counts."""
        return logits.sum(1) if self.weight is None else logits @ self.weight[at]

    def chosen(self, at: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether a token's label is in a piece, and where in it; some place if it is not."""
        there = (self.safe >= at.start) & (self.safe < at.stop)
        return there, (self.safe - at.start).clamp_(0, at.stop - at.start - 1).unsqueeze(1)

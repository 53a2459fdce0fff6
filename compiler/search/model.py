"""What a search asks of a model, and what it may be answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..driver.auto import Way
from ..ir.errors import BatchError, MemoryBudgetError, OptionError, PartitionError
from ..plan.plan import Plan
from .sketch import Sketch


class UntracedError(OptionError):
    """A way whose number of rows is not traced, as enough others are."""


REFUSALS = (BatchError, MemoryBudgetError, OptionError, PartitionError)


@dataclass(frozen=True)
class Model:
    """What a search asks of the model.

    Attributes:
        bound: of a way: seconds of a step, at least.
        sketch: what is expected of its plan.
        plan: it.
        nodes: of a way's graph.
        besides: what was not tried of the best way, in a line.
        twin: the same way with the other backend, where that is weighed.
        rough: a sketch in less time, which may be of less seconds and bytes than the other (then it
            says that it is rough); None where sketches take no time.
    """

    bound: Callable[[Way], float]
    sketch: Callable[[Way], Sketch]
    plan: Callable[[Way], Plan]
    nodes: Callable[[Way], int]
    besides: Callable[[Way], str] = lambda _: ""
    twin: Callable[[Way], Way | None] = lambda _: None
    rough: Callable[[Way], Sketch] | None = None


def in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())

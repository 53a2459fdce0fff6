"""Plans that differ from one in a single choice, and whether one of them is faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from ..driver.auto import Way
from ..ir.errors import PipecompileError
from ..options.checks import ZERO
from ..plan.plan import Plan
from .sketch import Sketch

HELPS = 0.03  # of a step: less is not worth being named
WIDE, NARROW = 0.2, 0.1  # bubbles: more microbatches may help above the one, fewer below the other
ORDERS = ("1f1b", None), ("zb_h1", None), ("interleaved", 2), ("zb_v", None)
"""(schedule, stages per rank) that are tried in the place of another."""


@dataclass(frozen=True)
class Near:
    """A way that differs in one thing.

    Attributes:
        flags: that ask for it.
    """

    way: Way
    flags: str


def neighbours_of(way: Way, plan: Plan, replicas_differ: bool) -> Iterator[Near]:
    """Args:
    way: with its level of ZeRO and its microbatches.
    plan: of it; one for inference has no order and nothing to divide.
    replicas_differ: whether ranks may become replicas, and replicas ranks.
    """
    count, bubble = way.microbatches or 1, plan.bubble
    if way.n_stages > 1 and plan.training:
        for name, virtual in ORDERS:
            if name != way.schedule:
                dealt = f" --virtual-stages {virtual}" if virtual else ""
                other = replace(way, schedule=name, virtual_stages=virtual, schedule_memory="auto")
                yield Near(other, f"--schedule {name}{dealt}")
    for level in ZERO if way.dp > 1 and plan.training else ():
        if level != way.zero:
            yield Near(replace(way, zero=level), f"--zero {level}")
    if replicas_differ and way.n_stages % 2 == 0:
        yield from _reshaped(way, way.n_stages // 2, way.dp * 2, count // 2)
    if replicas_differ and way.dp % 2 == 0:
        yield from _reshaped(way, way.n_stages * 2, way.dp // 2, count * 2)
    if bubble > WIDE:
        yield Near(replace(way, microbatches=2 * count), f"--microbatches {2 * count}")
    elif bubble < NARROW and count > 1:
        yield Near(replace(way, microbatches=count // 2), f"--microbatches {count // 2}")


def _reshaped(way: Way, n_stages: int, dp: int, count: int) -> Iterator[Near]:
    """With microbatches of the same size."""
    if count:
        zero = way.zero if dp > 1 else 0
        other = replace(way, n_stages=n_stages, dp=dp, microbatches=count, zero=zero)
        said = f" --dp {dp}" if dp > 1 else ""
        yield Near(other, f"--stages {n_stages}{said} --microbatches {count}")


def better_than(
    way: Way,
    plan: Plan,
    replicas_differ: bool,
    bound: Callable[[Way], float],
    sketch: Callable[[Way], Sketch],
) -> list[Near]:
    """The neighbours that seem to help by `HELPS`, the one that helps most first.

    Every one whose bound allows it is sketched: divided, recomputed and simulated like the plan
    itself. One that is not possible, or does not fit, is passed over.
    """
    found: list[tuple[float, Near]] = []
    try:
        limit_s = sketch(way).step_s * (1 - HELPS)
    except PipecompileError:
        return []
    for near in neighbours_of(way, plan, replicas_differ):
        with suppress(PipecompileError):
            if bound(near.way) < limit_s and (step_s := sketch(near.way).step_s) < limit_s:
                found.append((step_s, near))
    return [near for _, near in sorted(found, key=lambda pair: pair[0])]

"""Branch and bound over all ways: the lowest bound is sketched first, the best sketches planned.

1. Every way has a lower bound of its step (`bounds`). In their order, the lowest first, ways are
   sketched (`sketch`), until the next bound is above the best sketch.
2. In the order of their sketches, ways are planned, until the next sketch is more than `TIE` above
   the best one: sketches and plans differ by that much. The best plan is taken.

How much is looked at is counted in operators, so that the answer is the same on every machine.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..driver.auto import Trial, Way
from ..ir.errors import (
    BatchError,
    MemoryBudgetError,
    OptionError,
    PartitionError,
)
from ..plan.plan import Plan
from .sketch import Sketch

TIE = 0.05
"""Of a sketch: what is nearer to the best one than this is planned, too."""
MOST_PLANNED = 40_000  # operators of all graphs that programs are made of
MOST_SKETCHED = 4_000_000  # operators of all graphs that sketches are made of
SHOWN = 12  # ways of the table


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
    """

    bound: Callable[[Way], float]
    sketch: Callable[[Way], Sketch]
    plan: Callable[[Way], Plan]
    nodes: Callable[[Way], int]


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        best: the way with the shortest step that was planned.
        trials: the best dozen, those that were planned first; then one for each number of ranks
            that is not possible at all.
        ways, pruned, sketched, planned: how many there are; how many of these a bound excludes,
            were sketched, and were planned.
        stopped: what was left out as it would have taken too long; "" for nothing.
    """

    best: Trial
    trials: tuple[Trial, ...]
    ways: int
    pruned: int
    sketched: int
    planned: int
    stopped: str = ""

    @property
    def told(self) -> str:
        """In one line."""
        ended = f"; {self.stopped}" if self.stopped else ""
        return (
            f"{self.ways:,} ways: {self.pruned:,} cannot be better by their bounds, "
            f"{self.sketched:,} sketched, {self.planned:,} planned{ended}"
        )


def search(ways: Sequence[Way], model: Model) -> Found:
    """The best of all ways.

    Raises:
        OptionError: none is possible; with the reasons of some.
    """
    sketches, refused, left, stopped = _sketched(ways, model)
    if not sketches:
        raise OptionError(f'"auto": no way to use the devices is possible: {_reasons(refused)}')
    ordered = sorted(sketches, key=lambda pair: (pair[1].step_s, ways.index(pair[0])))
    planned: list[Trial] = []
    about: list[Trial] = []
    spent, limit = 0, ordered[0][1].step_s * (1 + TIE)
    for way, sketch in ordered:
        near = sketch.step_s <= limit
        full = spent + model.nodes(way) > MOST_PLANNED or len(planned) >= SHOWN
        if planned and (not near or full):
            if near:
                stopped = stopped or "not all that are as good by their sketches were planned"
            about.append(_expected(way, sketch))
            continue
        spent += model.nodes(way)
        try:
            planned.append(_trial(way, model.plan(way)))
        except REFUSALS as error:
            refused.append(Trial(way, way.microbatches, None, _line(error)))
    if not planned:
        raise OptionError(f'"auto": no way to use the devices is possible: {_reasons(refused)}')
    best = min(planned, key=lambda trial: trial.step_s or math.inf)
    planned.sort(key=lambda trial: trial.step_s or math.inf)
    shown = [*planned, *about][:SHOWN]
    possible = {way.n_stages for way, _ in sketches}
    trials = (*shown, *_samples([t for t in refused if t.way.n_stages not in possible]))
    counts = len(ways), left, len(sketches), len(planned)
    return Found(best, trials, *counts, stopped)


def _sketched(
    ways: Sequence[Way], model: Model
) -> tuple[list[tuple[Way, Sketch]], list[Trial], int, str]:
    """Sketches of all ways that may be the best; those that are not possible; how many cannot be
    better; and what was left out."""
    found: list[tuple[Way, Sketch]] = []
    refused: list[Trial] = []
    queue = []
    for number, way in enumerate(ways):
        try:
            queue.append((model.bound(way), number))
        except REFUSALS as error:
            refused.append(Trial(way, way.microbatches, None, _line(error)))
    heapq.heapify(queue)
    best_s, spent, untraced = math.inf, 0, 0
    while queue:
        bound_s, number = heapq.heappop(queue)
        way = ways[number]
        if bound_s > best_s * (1 + TIE):
            return found, refused, len(queue) + 1, _left_out(untraced)
        if found and spent > MOST_SKETCHED:
            return found, refused, 0, _left_out(untraced + len(queue) + 1)
        try:
            better = model.bound(way)  # more may be known by now
            if better > bound_s:
                heapq.heappush(queue, (better, number))
                continue
            sketch = model.sketch(way)
        except UntracedError:
            untraced += 1
        except REFUSALS as error:
            refused.append(Trial(way, way.microbatches, None, _line(error)))
        else:
            found.append((way, sketch))
            best_s = min(best_s, sketch.step_s)
        spent += model.nodes(way)
    return found, refused, 0, _left_out(untraced)


def _left_out(count: int) -> str:
    return f"{count:,} were not looked at, as the graphs are large" if count else ""


def _trial(way: Way, plan: Plan) -> Trial:
    peak = max(stage.memory.peak for stage in plan.stages)
    zero = int(plan.options["zero"])
    return Trial(way, plan.microbatches, plan.step_s, "", plan.bubble, peak, zero)


def _expected(way: Way, sketch: Sketch) -> Trial:
    peak = round(sketch.peak_bytes)
    figures = sketch.step_s, "", sketch.bubble, peak, way.zero or 0
    return Trial(way, way.microbatches, *figures, about=True)


def _samples(refused: Sequence[Trial]) -> list[Trial]:
    """One for each number of ranks."""
    first: dict[int, Trial] = {}
    for trial in refused:
        first.setdefault(trial.way.n_stages, trial)
    return [first[n] for n in sorted(first)]


def _reasons(refused: Sequence[Trial]) -> str:
    return "; ".join(f"{trial.way}: {trial.reason}" for trial in _samples(refused))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def rated(found: Found, plan: Plan, peak: float) -> Found:
    """With utilization, and the price of 10⁹ tokens.

    Args:
        plan: of the best.
        peak: FLOP/s of a device.
    """
    devices, replicas = plan.n_stages * plan.dp, plan.microbatches * plan.dp
    tokens = replicas * plan.microbatch_tokens
    flops = replicas * sum(each.forward_flops + each.backward_flops for each in plan.stages)

    def of(trial: Trial) -> Trial:
        if not trial.step_s:
            return trial
        device_s = devices * trial.step_s
        hours = device_s / 3600 * 1e9 / tokens if tokens else 0.0
        return replace(trial, mfu=flops / (device_s * peak), device_hours=hours)

    return replace(found, best=of(found.best), trials=tuple(map(of, found.trials)))

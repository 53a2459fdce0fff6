"""Branch and bound over all ways: the lowest bound is sketched first, the best sketches planned.

1. Every way has a lower bound of its step (`bounds`). In their order, the lowest first, ways are
   sketched (`sketch`), until the next bound is above the best sketch: no other is as good.
2. That one is planned, and the next best looked for in the same way, until the next sketch is more
   than `TIE` above the best one: sketches and plans differ by that much; or until as much has been
   planned as is worth it. The best plan is taken.

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
        ways, pruned, sketched, planned: how many there are; how many of these cannot be better than
            the best by their bounds, were sketched, and were planned.
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
    looking = _Looking(ways, model)
    planned: list[Trial] = []
    spent, limit_s = 0, math.inf
    passed: list[tuple[Way, Sketch]] = []  # one that is as good, where no more are planned
    while (pair := looking.next_best(limit_s if planned else math.inf)) is not None:
        way, sketch = pair
        limit_s = min(limit_s, sketch.step_s * (1 + TIE))
        if planned and (spent + model.nodes(way) > MOST_PLANNED or len(planned) >= SHOWN):
            passed.append(pair)
            break
        spent += model.nodes(way)
        try:
            planned.append(_trial(way, model.plan(way)))
        except REFUSALS as error:
            looking.refuse(way, error)
    refused = looking.refused
    if not planned:
        raise OptionError(f'"auto": no way to use the devices is possible: {_reasons(refused)}')
    best = min(planned, key=lambda trial: trial.step_s or math.inf)
    planned.sort(key=lambda trial: trial.step_s or math.inf)
    about = [_expected(*pair) for pair in (*passed, *looking.rest())]
    shown = [*planned, *about][:SHOWN]
    trials = (*shown, *_samples([t for t in refused if t.way.n_stages not in looking.possible]))
    left = looking.left(best.step_s or math.inf)
    counts = len(ways), left, looking.sketched, len(planned)
    return Found(best, trials, *counts, looking.stopped(bool(passed), len(looking) - left))


class _Looking:
    """Sketches of ways in their order, the best first, made as far as bounds ask for them.

    A way is the next best one when no bound of a way without a sketch is below its sketch. So
    whatever is asked for comes in the order that it would have if all were sketched.

    Of ways with the same bound the highest level of ZeRO is looked at first: where that does not
    fit, no other does, which the model may know then.

    Attributes:
        possible: numbers of ranks of those that were sketched.
        sketched: how many were.
    """

    def __init__(self, ways: Sequence[Way], model: Model):
        self._ways, self._model = ways, model
        self._refused: dict[tuple[float, int], Trial] = {}
        self.possible: set[int] = set()
        self.sketched = 0
        self._made: list[tuple[float, int, Sketch]] = []
        self._queue: list[tuple[float, int, int]] = []
        self._spent, self._missed = 0, 0
        for number, way in enumerate(ways):
            try:
                self._queue.append((model.bound(way), -(way.zero or 0), number))
            except REFUSALS as error:
                self.refuse(way, error, 0.0, number)
        heapq.heapify(self._queue)

    def refuse(
        self, way: Way, error: Exception, bound_s: float = math.inf, number: int | None = None
    ) -> None:
        """Note why it is not possible."""
        place = bound_s, len(self._refused) if number is None else number
        self._refused[place] = Trial(way, way.microbatches, None, _line(error))

    @property
    def refused(self) -> list[Trial]:
        """Those that are not possible, by their bounds; those that were to be planned come last."""
        return [self._refused[place] for place in sorted(self._refused)]

    def __len__(self) -> int:
        """Ways that are neither sketched nor refused."""
        return len(self._queue)

    def left(self, best_s: float) -> int:
        """Those of them that a bound excludes."""
        return sum(bound_s >= best_s for bound_s, _, _ in self._queue)

    def stopped(self, full: bool, others: int) -> str:
        """What was left out.

        Args:
            full: no more were planned, though they are as good by their sketches.
            others: that were not sketched, and are not excluded.
        """
        said = ["not all that are as good by their sketches were planned"] if full else []
        if others:
            said.append(f"{others:,} whose bounds come after these were not sketched")
        if self._missed:
            said.append(f"{self._missed:,} were not looked at, as the graphs are large")
        return "; ".join(said)

    def next_best(self, limit_s: float) -> tuple[Way, Sketch] | None:
        """The next one; None if no other takes at most so many seconds."""
        while self._queue and self._queue[0][0] <= min(limit_s, self._least_s):
            if self.sketched and self._spent > MOST_SKETCHED:
                self._missed += len(self._queue)
                self._queue.clear()
            else:
                self._look()
        if self._least_s > limit_s or not self._made:
            return None
        _, number, sketch = heapq.heappop(self._made)
        return self._ways[number], sketch

    def rest(self) -> list[tuple[Way, Sketch]]:
        """What was sketched and not asked for."""
        return [(self._ways[number], sketch) for _, number, sketch in sorted(self._made)]

    @property
    def _least_s(self) -> float:
        return self._made[0][0] if self._made else math.inf

    def _look(self) -> None:
        """At the way with the lowest bound."""
        model, (bound_s, level, number) = self._model, heapq.heappop(self._queue)
        way = self._ways[number]
        try:
            better = model.bound(way)  # more may be known by now
            if better > bound_s:
                heapq.heappush(self._queue, (better, level, number))
                return
            sketch = model.sketch(way)
        except UntracedError:
            self._missed += 1
        except REFUSALS as error:
            self.refuse(way, error, bound_s, number)
        else:
            heapq.heappush(self._made, (sketch.step_s, number, sketch))
            self.possible.add(way.n_stages)
            self.sketched += 1
        self._spent += model.nodes(way)


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

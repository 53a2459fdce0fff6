"""Branch and bound over all ways: the lowest bound is sketched first, the best sketches planned.

1. Every way has a lower bound of its step (`bounds`). In their order, the lowest first, ways are
   sketched (`sketch`), until the next bound is above the best sketch: no other is as good.
2. That one is planned, and the next best looked for in the same way, until the next sketch is more
   than `TIE` above the best one: sketches and plans differ by that much; or until as much has been
   planned as is worth it. The best plan is taken.
3. Where the first `MOST_REFUSED` plans do not fit, those whose sketches need the least memory are
   planned instead.
4. Where the backend is weighed all of that is done with the one whose kernels take no longer by the
   prices, and the other is looked at for what was planned (`_Planning.weigh`).

How much is looked at is counted in operators, so that the answer is the same on every machine.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
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
MOST_REFUSED = 12  # plans, one after the other, before those are tried that need the least memory
ROOMIEST = 4  # of these


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
    """

    bound: Callable[[Way], float]
    sketch: Callable[[Way], Sketch]
    plan: Callable[[Way], Plan]
    nodes: Callable[[Way], int]
    besides: Callable[[Way], str] = lambda _: ""
    twin: Callable[[Way], Way | None] = lambda _: None


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        best: the way with the shortest step that was planned.
        trials: the best dozen, those that were planned first; then the best one with the other
            backend, where that is weighed; of the others in the order of their sketches, with a
            reason those whose plans were refused; then one for each number of ranks that is not
            possible at all.
        ways, pruned, unfit, sketched, planned: how many there are; how many of these cannot be
            better than the best by their bounds, cannot fit, were sketched, and were planned.
        stopped: what was left out as it would have taken too long; "" for nothing.
        besides: what was not tried.
    """

    best: Trial
    trials: tuple[Trial, ...]
    ways: int
    pruned: int
    unfit: int
    sketched: int
    planned: int
    stopped: str = ""
    besides: str = ""

    @property
    def told(self) -> str:
        """In one line."""
        ended = "".join(f"; {said}" for said in (self.stopped, self.besides) if said)
        unfit = f"{self.unfit:,} cannot fit, " if self.unfit else ""
        return (
            f"{self.ways:,} ways: {self.pruned:,} cannot be better by their bounds, {unfit}"
            f"{self.sketched:,} sketched, {self.planned:,} planned{ended}"
        )


def search(ways: Sequence[Way], model: Model) -> Found:
    """The best of all ways.

    Raises:
        OptionError: none is possible; with the reasons of some.
    """
    looking, planning = _Looking(ways, model), _Planning(model)
    limit_s = math.inf
    passed: list[tuple[Way, Sketch]] = []  # one that is as good, where no more are planned
    while (pair := looking.next_best(limit_s if planning.planned else math.inf)) is not None:
        limit_s = min(limit_s, pair[1].step_s * (1 + TIE))
        if planning.full(pair[0]):
            passed.append(pair)
            break
        planning.plan(*pair)
    stopped = ""
    if passed and not planning.planned:
        stopped = planning.roomiest([*passed, *looking.rest()])
        passed = []
    planning.weigh()
    refused = [*looking.refused, *planning.refused]
    if not planning.planned:
        raise OptionError(
            f'"auto": no way to use the devices is possible: {_reasons(refused)}'
            f"{f' ({stopped})' if stopped else ''}"
        )
    planned = sorted(planning.planned, key=lambda trial: trial.step_s or math.inf)
    best, done = planned[0], {trial.way for trial in (*planned, *planning.refused)}
    rest = [pair for pair in (*passed, *looking.rest()) if pair[0] not in done]
    about = [_expected(*pair) for pair in rest] + planning.declined
    about.sort(key=lambda trial: trial.step_s or math.inf)
    first = [*planned, *planning.twins]
    shown = [*first, *about[: max(0, SHOWN - len(first))]]
    trials = (*shown, *_samples([t for t in refused if t.way.n_stages not in looking.possible]))
    left = looking.left(best.step_s or math.inf)
    counts = len(ways), left, looking.unfit, looking.sketched, len(planned)
    others = looking.stopped(bool(passed), len(looking) - left)
    said = "; ".join(filter(None, (stopped, others)))
    return Found(best, trials, *counts, said, model.besides(best.way))


class _Planning:
    """Plans of the best sketches.

    Attributes:
        planned: those that fit.
        refused: those that do not.
        declined: these with the figures of their sketches.
        twins: the best one with the other backend, by its sketch, if its plan is not made.
    """

    def __init__(self, model: Model):
        self._model, self._spent = model, 0
        self._sketches: dict[Way, Sketch] = {}
        self.planned: list[Trial] = []
        self.refused: list[Trial] = []
        self.declined: list[Trial] = []
        self.twins: list[Trial] = []

    def full(self, way: Way) -> bool:
        """Whether no more is worth it."""
        if not self.planned:
            return len(self.refused) >= MOST_REFUSED
        much = self._spent + self._model.nodes(way) > MOST_PLANNED
        return much or len(self.planned) >= SHOWN

    def weigh(self) -> None:
        """The other backend for what was planned: of ways that their bounds do not exclude sketches
        are made, and plans of those that are as near to the best one as others that are planned.
        Where no plan fits it is the first one's, as programs of one backend may hold what those of
        the other do not."""
        ordered = sorted(self.planned, key=lambda trial: trial.step_s or math.inf)
        least_s = min((each.step_s for each in self._sketches.values()), default=0.0)
        for number, trial in enumerate(ordered or self.refused[:1]):
            twin = self._model.twin(trial.way)
            if twin is None or twin in self._sketches:
                continue
            with suppress(*REFUSALS):
                best_s = min((each.step_s or math.inf for each in self.planned), default=math.inf)
                if number and self._model.bound(twin) >= best_s:
                    continue
                sketch = self._model.sketch(twin)
                near = sketch.step_s <= least_s * (1 + TIE) and not self.full(twin)
                if near or sketch.step_s < least_s or not ordered:
                    self.plan(twin, sketch)
                elif not number:
                    self.twins.append(_expected(twin, sketch))

    def plan(self, way: Way, sketch: Sketch) -> None:
        self._spent += self._model.nodes(way)
        self._sketches[way] = sketch
        try:
            self.planned.append(_trial(way, self._model.plan(way)))
        except REFUSALS as error:
            reason = _line(error)
            self.refused.append(Trial(way, way.microbatches, None, reason))
            self.declined.append(replace(_expected(way, sketch), reason=reason))

    def roomiest(self, sketched: Sequence[tuple[Way, Sketch]]) -> str:
        """Plan those that need the least memory by their sketches, until one fits; says so."""
        count = len(self.refused)
        ordered = sorted(sketched, key=lambda pair: pair[1].peak_bytes)
        for pair in ordered[:ROOMIEST]:
            self.plan(*pair)
            if self.planned:
                break
        if not self.planned:
            return f"of {len(sketched) + count} sketches the best and the smallest were planned"
        return (
            f"the plans of the best {count} sketches do not fit, so that those that need the least "
            "memory were planned: others may be better"
        )


class _Looking:
    """Sketches of ways in their order, the best first, made as far as bounds ask for them.

    A way is the next best one when no bound of a way without a sketch is below its sketch. So
    whatever is asked for comes in the order that it would have if all were sketched.

    Of ways with the same bound the highest level of ZeRO is looked at first: where that does not
    fit, no other does, which the model may know then.

    Attributes:
        possible: numbers of ranks of those that were sketched.
        sketched: how many were.
        unfit: how many were looked at that do not fit into memory.
    """

    def __init__(self, ways: Sequence[Way], model: Model):
        self._ways, self._model = ways, model
        self._refused: dict[tuple[float, int], Trial] = {}
        self.possible: set[int] = set()
        self.sketched = self.unfit = 0
        self._made: list[tuple[float, int, Sketch]] = []
        self._queue: list[tuple[float, int, int]] = []
        self._spent, self._missed = 0, 0
        for number, way in enumerate(ways):
            try:
                self._queue.append((model.bound(way), -(way.zero or 0), number))
            except REFUSALS as error:
                self.refuse(way, error, 0.0, number)
        heapq.heapify(self._queue)

    def refuse(self, way: Way, error: Exception, bound_s: float, number: int) -> None:
        """Note why it is not possible."""
        self._refused[bound_s, number] = Trial(way, way.microbatches, None, _line(error))

    @property
    def refused(self) -> list[Trial]:
        """Those that are not possible, by their bounds."""
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
            self.unfit += isinstance(error, MemoryBudgetError)
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

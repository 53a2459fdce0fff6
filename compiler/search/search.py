"""Branch and bound over all ways: the lowest bound is sketched first, the best sketches planned.

1. Every way has a lower bound of its step (`bounds`). In their order, the lowest first, ways are
   sketched (`sketch`), until the next bound is above the best sketch: no other is as good. Where
   sketches take time they are rough at first, and made anew where one is the best.
2. That one is planned, and the next best looked for in the same way, until the next sketch is more
   than `TIE` above the best one, as sketches and plans differ by that much, and not below the best
   plan; or until as much has been planned as is worth it. The best plan is taken.
3. Where the first `MOST_REFUSED` plans do not fit, those whose sketches need the least memory are
   planned instead.
4. Where the backend is weighed all of that is done with the one whose kernels take no longer by the
   prices, and the other is looked at for what was planned (`_Planning.weigh`).

How much is looked at is counted in operators, so that the answer is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ..driver.auto import Trial, Way
from ..ir.errors import OptionError
from ..plan.plan import Plan
from .looking import Looking
from .model import REFUSALS, Model, in_a_line
from .sketch import Sketch

TIE = 0.05
"""Of a sketch: what is nearer to the best one than this is planned, too."""
MOST_PLANNED = 40_000  # operators of all graphs that programs are made of
SHOWN = 12  # ways of the table
MOST_REFUSED = 12  # plans, one after the other, before those are tried that need the least memory
ROOMIEST = 4  # of these


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
    looking, planning = Looking(ways, model), _Planning(model)
    least_s = math.inf
    passed: list[tuple[Way, Sketch]] = []  # one that is as good, where no more are planned
    while (pair := looking.next_best(max(least_s * (1 + TIE), planning.best_s))) is not None:
        least_s = min(least_s, pair[1].step_s)
        if planning.full(pair[0]):
            passed.append(pair)
            break
        planning.plan(*pair)
    stopped = ""
    if passed and not planning.planned:
        stopped = planning.roomiest([*passed, *looking.smallest(ROOMIEST)], looking.sketched)
        passed = []
    planning.weigh()
    others = looking.rest(SHOWN)
    refused = [*looking.refused, *planning.refused]
    if not planning.planned:
        raise OptionError(
            f'"auto": no way to use the devices is possible: {_reasons(refused)}'
            f"{f' ({stopped})' if stopped else ''}"
        )
    planned = sorted(planning.planned, key=lambda trial: trial.step_s or math.inf)
    best, done = planned[0], {trial.way for trial in (*planned, *planning.refused)}
    rest = [pair for pair in (*passed, *others) if pair[0] not in done]
    about = [_expected(*pair) for pair in rest] + planning.declined
    about.sort(key=lambda trial: trial.step_s or math.inf)
    first = [*planned, *planning.twins]
    shown = [*first, *about[: max(0, SHOWN - len(first))]]
    trials = (*shown, *_samples([t for t in refused if t.way.n_stages not in looking.possible]))
    left = looking.left(best.step_s or math.inf)
    counts = len(ways), left, looking.unfit, looking.sketched, len(planned)
    unseen = looking.stopped(bool(passed), len(looking) - left)
    said = "; ".join(filter(None, (stopped, unseen)))
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

    @property
    def best_s(self) -> float:
        """Of those that fit; infinite where there is none."""
        return min((each.step_s or math.inf for each in self.planned), default=math.inf)

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
                if number and self._model.bound(twin) >= self.best_s:
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
            self.planned.append(Trial.of(way, self._model.plan(way)))
        except REFUSALS as error:
            reason = in_a_line(error)
            self.refused.append(Trial(way, way.microbatches, None, reason))
            self.declined.append(replace(_expected(way, sketch), reason=reason))

    def roomiest(self, sketched: Sequence[tuple[Way, Sketch]], among: int) -> str:
        """Plan those that need the least memory by their sketches, until one fits; says so.

        Args:
            among: how many sketches there are.
        """
        count = len(self.refused)
        ordered = sorted(sketched, key=lambda pair: pair[1].peak_bytes)
        for pair in ordered[:ROOMIEST]:
            self.plan(*pair)
            if self.planned:
                break
        if not self.planned:
            return f"of {among} sketches the best and the smallest were planned"
        return (
            f"the plans of the best {count} sketches do not fit, so that those that need the least "
            "memory were planned: others may be better"
        )


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

"""Ways in the order of their sketches, made as far as bounds ask for them."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence

from ..driver.auto import Trial, Way
from ..ir.errors import MemoryBudgetError
from .model import REFUSALS, Model, UntracedError, in_a_line
from .sketch import Sketch

MOST_SKETCHED = 4_000_000  # operators of all graphs that sketches are made of
MOST_SETTLED = 24  # rough sketches that are made anew for one list


class Looking:
    """Sketches of ways in their order, the best first, made as far as bounds ask for them.

    A way is the next best one when no bound of a way without a sketch is below its sketch. So
    whatever is asked for comes in the order that it would have if all were sketched. In the same
    way rough sketches stand for the others: what is asked for is not rough.

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
        self._possible = Counter[int]()
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
        self._refused[bound_s, number] = Trial(way, way.microbatches, None, in_a_line(error))
        self.unfit += isinstance(error, MemoryBudgetError)

    @property
    def possible(self) -> set[int]:
        return {n_stages for n_stages, count in self._possible.items() if count}

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
        while True:
            while self._queue and self._queue[0][0] <= min(limit_s, self._least_s):
                if self.sketched and self._spent > MOST_SKETCHED:
                    self._missed += len(self._queue)
                    self._queue.clear()
                else:
                    self._look()
            if self._least_s > limit_s or not self._made:
                return None
            _, number, sketch = heapq.heappop(self._made)
            if not sketch.rough:
                return self._ways[number], sketch
            self._settle(number)

    def rest(self, first: int) -> list[tuple[Way, Sketch]]:
        """What was sketched and not asked for, the best first, without what is still rough.

        Args:
            first: how many to make sure of.
        """
        tries, sure = MOST_SETTLED, list[tuple[float, int, Sketch]]()
        while self._made and len(sure) < first:
            made = heapq.heappop(self._made)
            if not made[2].rough:
                sure.append(made)
            elif tries:
                self._settle(made[1])
                tries -= 1
        for made in sure:
            heapq.heappush(self._made, made)
        every = sorted(self._made)
        return [(self._ways[number], sketch) for _, number, sketch in every if not sketch.rough]

    def smallest(self, count: int) -> list[tuple[Way, Sketch]]:
        """Of what was sketched and not asked for, so much that needs the least memory."""
        tries, found = MOST_SETTLED, list[tuple[Way, Sketch]]()
        order = [(sketch.peak_bytes, number, sketch) for _, number, sketch in self._made]
        heapq.heapify(order)
        self._made.clear()
        while order and len(found) < count:
            _, number, sketch = heapq.heappop(order)
            if not sketch.rough:
                found.append((self._ways[number], sketch))
                self._make(number, sketch)
            elif tries:
                tries -= 1
                if (again := self._settled(number)) is not None:
                    heapq.heappush(order, (again.peak_bytes, number, again))
        for _, number, sketch in order:
            self._make(number, sketch)
        return found

    def _make(self, number: int, sketch: Sketch) -> None:
        heapq.heappush(self._made, (sketch.step_s, number, sketch))

    def _settle(self, number: int) -> None:
        if (sketch := self._settled(number)) is not None:
            self._make(number, sketch)

    def _settled(self, number: int) -> Sketch | None:
        """The sketch of a way whose rough one is known; None where it does not fit after all."""
        way, model = self._ways[number], self._model
        self._spent += model.nodes(way)
        try:
            return model.sketch(way)
        except REFUSALS as error:
            self.refuse(way, error, model.bound(way), number)
            self._possible[way.n_stages] -= 1
            self.sketched -= 1
            return None

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
            sketch = (model.rough or model.sketch)(way)
        except UntracedError:
            self._missed += 1
        except REFUSALS as error:
            self.refuse(way, error, bound_s, number)
        else:
            self._make(number, sketch)
            self._possible[way.n_stages] += 1
            self.sketched += 1
        self._spent += model.nodes(way)

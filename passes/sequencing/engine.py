"""Simulates all ranks together, in the order of time, while somebody picks what each does next.

An order made here ends, with any limit that holds one microbatch, if all that has room is started
some day. For on every rank there is always room for all that the oldest microbatch still has to
stash there, and for its B: F of a younger one has room only if what the younger ones hold, one
whole microbatch, and what a B may hold more than its stash, fit together. So the oldest one can go
all its way, and gives back what it holds. W can run at any time, and makes room.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from .problem import B, F, Order, Problem, Step, W, allowed

Pick = Callable[[int, float], tuple[Step | None, float]]
"""(rank, now) -> the step that starts now; or None, and when to ask again.

It is asked again, too, when something is about to arrive that was not on its way yet.
"""


class Engine:
    """One run. What has been decided stays so.

    Attributes:
        done: [kind][stage] -> how many microbatches have started.
        arrived: [F or B][stage] -> per microbatch, when all that it reads is there, in seconds; as
            far as that is known: the last ones may be on their way.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.m = problem.microbatches
        ranks = len(problem.placement)
        self.done = [[0] * problem.n_stages for _ in range(3)]
        self.arrived: list[list[list[float]]] = [[[] for _ in problem.homes] for _ in (F, B)]
        self.arrived[F][0] = [0.0] * self.m
        self._ends: list[list[list[float]]] = [[[] for _ in problem.homes] for _ in (F, B)]
        self._steps: list[list[Step]] = [[] for _ in range(ranks)]
        self._free = [0.0] * ranks
        self._wakes = [0.0] * ranks
        self._events = [(0.0, rank) for rank in range(ranks)]
        self._limits = [allowed(limit) for limit in problem.limit_bytes]
        pairs = zip(self._limits, problem.excess_bytes, strict=True)
        self._stash_limits = [limit - excess for limit, excess in pairs]

    def run(self, pick: Pick) -> Order | None:
        """The order that is picked; None if it comes to a halt."""
        while self._events:
            now, rank = heapq.heappop(self._events)
            if now != self._wakes[rank]:
                continue
            self._wakes[rank] = math.inf
            step, later = pick(rank, now)
            if step is not None:
                self._start(rank, step, now)
                later = self._free[rank]
            self._wake(rank, later)
        finished = sum(map(len, self._steps)) == self.problem.steps
        return tuple(map(tuple, self._steps)) if finished else None

    def _wake(self, rank: int, when: float) -> None:
        when = max(when, self._free[rank])
        if when < self._wakes[rank]:
            self._wakes[rank] = when
            heapq.heappush(self._events, (when, rank))

    def _start(self, rank: int, step: Step, now: float) -> None:
        kind, stage, microbatch = step
        problem = self.problem
        self._steps[rank].append(step)
        self.done[kind][stage] += 1
        end = self._free[rank] = now + problem.seconds[kind][stage]
        if kind == W:
            return
        self._ends[kind][stage].append(end)
        if kind == F and stage == problem.n_stages - 1:
            self.arrived[B][stage].append(end)
            return
        reader = stage + 1 if kind == F else stage - 1
        if reader < 0:
            return
        when = end
        for other, under_way in problem.before[kind][reader]:
            when = max(when, self._ends[kind][other][microbatch] + under_way)
        self.arrived[kind][reader].append(when)
        self._wake(problem.homes[reader], when)

    def fits(self, rank: int, step: Step) -> bool:
        """Whether F or B fits into memory now."""
        kind, stage, _ = step
        problem, done = self.problem, self.done
        held = 0.0
        for s in problem.placement[rank]:
            held += (done[F][s] - done[B][s]) * problem.stash_bytes[s]
            held += (done[B][s] - done[W][s]) * problem.carried[s]
        more = problem.stash_bytes[stage]
        if kind == B:
            more = problem.carried[stage] - more
        return more <= 0 or held + more <= self._limits[rank]

    def room(self, rank: int, step: Step) -> bool:
        """Whether it fits, and whatever must come after it does, too."""
        if not self.fits(rank, step):
            return False
        kind, stage, microbatch = step
        if kind == B:
            return True
        problem, done = self.problem, self.done
        stages, sizes = problem.placement[rank], problem.stash_bytes
        if all(done[B][s] >= microbatch >= done[F][s] - 1 for s in stages):
            return True  # it is alone
        oldest = min(done[F][s] for s in stages)  # that has not run all its F here
        stashed = younger = sizes[stage]
        for s in stages:
            stashed += (done[F][s] - done[B][s]) * sizes[s]
            younger += max(0, done[F][s] - max(oldest + 1, done[B][s])) * sizes[s]
        if microbatch > oldest and younger + problem.whole_bytes[rank] > self._stash_limits[rank]:
            return False
        return stashed <= self._stash_limits[rank]

    def weight(self, rank: int) -> Step | None:
        """The oldest W of a rank that can start."""
        problem, done = self.problem, self.done
        found = None
        for s in problem.placement[rank]:
            count = done[W][s]
            if problem.splits[s] and count < done[B][s] and (found is None or count < found[2]):
                found = (W, s, count)
        return found

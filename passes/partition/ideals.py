"""The exact optimum over all divisions of an order that has few ideals, units without options.

An ideal holds with each unit all that must come before it; stages 0 to s together are one. So a
division is a chain of ideals, and the best one is found by a dynamic program over them
(Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators", NeurIPS
2020, section 5). What makes it fast is a good solution to start from: ideals whose seconds the
stages before or after could not do in less than its objective are left out, and so are stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...compiler.ir.problem import Problem
from ..integer.work import Work
from . import dominance

MOST_IDEALS = 300_000
MOST_BYTES = 8e8  # of the tables, five for every ideal and value

_STEPS = (0.15, 0.4, 0.7, 1.0)  # of the way from a simple bound to the known objective
_IDEAL_S, _EXTEND_S, _CELL_S = 5e-6, 5e-5, 1e-9  # work: of an ideal, as a start, of a table
_TICKS = 1e12  # seconds as whole numbers, whose sums are exact, for sorting
_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Answer:
    """The optimum.

    Attributes:
        stage: per unit; None if nothing that fits and is below the bound was found.
        bound: no solution has a smaller objective; infinite: none fits.
    """

    stage: tuple[int, ...] | None
    bound: float


def applies(problem: Problem) -> bool:
    """Whether bytes add up over units without options, and the slowest stage is the objective."""
    return (
        dominance.applies(problem)
        and not problem.kept
        and not any(option.transient_bytes for (option,) in problem.options)
        and not problem.pins
        and problem.max_weight > 0
        and not problem.sum_weight
    )


def minimise_time(problem: Problem, upper: float, *, work: Work) -> Answer | None:
    """The best division; None if there are too many ideals, or no work is left for any answer.

    A low limit on the stages' seconds leaves few ideals and stages: if any division keeps it, the
    best one does, and if none does, that is a bound. So limits are raised step by step.

    Args:
        upper: an objective that is known to be reached.
    """
    most = min(MOST_IDEALS, MOST_BYTES / (problem.n_units + 5 * len(problem.values)))
    found = ideals_of(problem, most, work)
    if found is None:
        return None
    unit_s = problem.fewest_s()
    low_s = max(max(unit_s), math.fsum(unit_s) / problem.n_stages)
    high_s = upper / problem.max_weight
    steps = _STEPS if math.isfinite(high_s) else (1.0,)
    bound = None
    for step in steps:
        limit_s = high_s * (1 - 1e-9) if step == 1 else low_s + step * (high_s - low_s)
        if limit_s >= low_s:  # else the tables lack even the empty ideal
            search = _Search(problem, found, limit_s)
            slowest_s = search.run(work)
            if slowest_s is None:
                break
            if math.isfinite(slowest_s):
                return Answer(search.stages(), slowest_s * problem.max_weight)
        bound = upper if step == 1 else limit_s * problem.max_weight
    return None if bound is None else Answer(None, bound)


def ideals_of(problem: Problem, most: float, work: Work) -> list[int] | None:
    """All of them, as bits, the smaller ones first; None if there are too many."""
    needs, after = [0] * problem.n_units, [0] * problem.n_units
    for u, v in problem.edges:
        needs[v] |= 1 << u
        after[u] |= 1 << v
    ready = sum(1 << u for u in range(problem.n_units) if not needs[u])
    level, found = {0: ready}, [0]
    while level:
        larger: dict[int, int] = {}
        for ideal, free in level.items():
            rest = free
            while rest:
                bit = rest & -rest
                rest ^= bit
                more = ideal | bit
                if more not in larger:
                    larger[more] = free ^ bit | _freed(after[bit.bit_length() - 1], needs, more)
        found += larger
        level = larger
        work.spend(_IDEAL_S * len(larger))
        if len(found) > most or work.over:
            return None
    return found


def _freed(candidates: int, needs: list[int], ideal: int) -> int:
    """Of some units, those whose needs are in the ideal."""
    freed = 0
    while candidates:
        bit = candidates & -candidates
        candidates ^= bit
        if not needs[bit.bit_length() - 1] & ~ideal:
            freed |= bit
    return freed


class _Search:
    """The dynamic program, from smaller to larger ideals.

    A stage holds D = J − I for ideals I ⊂ J. Its seconds are those of J alone (as if I were
    empty), less those of I's units, corrected for the values with one end inside I and one
    outside.

    Attributes:
        member: [ideal, unit].
        seconds: [ideal], of its units.
        read: [value, ideal]: how many readers are inside; made: whether the source is.
        best: [stages, ideal]: the slowest of so many stages that hold the ideal; source: the
            ideal that the last of them starts from.
    """

    def __init__(self, problem: Problem, ideals: list[int], limit_s: float) -> None:
        self.problem, self.limit_s = problem, limit_s
        unit_s = np.array(problem.fewest_s())
        member = _members(ideals, problem.n_units)
        scale = _TICKS / (unit_s.sum() or 1.0)
        ticks = member @ np.round(unit_s * scale).astype(np.int64)
        order = np.lexsort((member.sum(axis=1), ticks))
        order = order[self._useful(ticks[order] / scale)]
        self.member, self.seconds = member[order], ticks[order] / scale
        self.words = _packed(self.member)
        self.static = self.member @ np.array([each[0].static_bytes for each in problem.options])
        self.stash = self.member @ np.array([each[0].stash_bytes for each in problem.options])
        budgets = np.array(problem.budget_bytes)
        self.room = budgets * (1 + 1e-10) - np.array(problem.reserve_bytes)
        self._values()
        shape = (problem.n_stages + 1, len(order))
        self.best = np.full(shape, math.inf)
        self.source = np.full(shape, -1)
        self.best[0, 0] = 0.0

    def _windows(self) -> tuple[_Floats, _Floats]:
        """Seconds that the first s stages hold, at least and at most."""
        stages, total = self.problem.n_stages, self.total_s
        done = np.arange(stages + 1)
        slack = 1e-9 * total
        limit = min(self.limit_s, total)
        low = total - (stages - done) * limit - slack
        return low.astype(np.float64), (done * limit + slack).astype(np.float64)

    def _useful(self, seconds: _Floats) -> npt.NDArray[np.bool_]:
        self.total_s = float(seconds[-1])
        low, high = self._windows()
        inside = (seconds[:, None] >= low) & (seconds[:, None] <= high)
        useful: npt.NDArray[np.bool_] = np.any(inside, axis=1)
        return useful

    def _values(self) -> None:
        values = self.problem.values
        self.send_s = np.array([value.send_s for value in values])
        self.receive_s = np.array([value.receive_s for value in values])
        self.size = np.array([len(value.readers) for value in values])
        shape = (len(values), len(self.member))
        self.made, self.read = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int16)
        for number, value in enumerate(values):
            self.made[number] = self.member[:, value.source]
            self.read[number] = self.member[:, list(value.readers)].sum(axis=1)
        every = self.read == self.size[:, None]
        self.crossing = (self.made | (self.read > 0)) & ~(self.made & every)
        sent, received = self.made & ~every, ~self.made & (self.read > 0)
        self.alone_s = self.seconds + self.send_s @ sent + self.receive_s @ received

    def run(self, work: Work) -> float | None:
        """Seconds of the best division's slowest stage; infinite if none is below the limit."""
        low, high = self._windows()
        starts = (self.seconds[:, None] >= low[:-1]) & (self.seconds[:, None] <= high[:-1])
        for i in range(len(self.seconds)):
            for s in range(self.problem.n_stages):  # a stage may be empty
                if self.best[s, i] < self.best[s + 1, i] and self.room[s] >= 0:
                    self.best[s + 1, i], self.source[s + 1, i] = self.best[s, i], i
            stages = np.flatnonzero((self.best[:-1, i] < self.limit_s) & starts[i])
            if stages.size:
                work.spend(self._extend(i, stages, low, high))
            if not i % 64 and work.over:
                return None
        return float(self.best[-1, -1])

    def _extend(self, i: int, stages: _Ints, low: _Floats, high: _Floats) -> float:
        """Add a stage after ideal i, which the numbers of stages ``stages`` hold; its work."""
        end = int(np.searchsorted(self.seconds, self.seconds[i] + self.limit_s, side="right"))
        first = max(i + 1, int(np.searchsorted(self.seconds, low[stages[0] + 1])))
        above = ~np.any(self.words[i] & ~self.words[first:end], axis=1)
        larger = first + np.flatnonzero(above)
        work_s: float = _EXTEND_S + _CELL_S * max(0, end - first) * self.words.shape[1]
        if not larger.size:
            return work_s
        cost = self._cost(i, larger)
        crossing = int(self.crossing[:, i].sum())
        work_s += 10 * _CELL_S * larger.size * (crossing + stages.size)
        fits = cost < self.limit_s
        larger, cost = larger[fits], cost[fits]
        static, stash = self.static[larger] - self.static[i], self.stash[larger] - self.stash[i]
        for s in stages:
            inside = (self.seconds[larger] >= low[s + 1]) & (self.seconds[larger] <= high[s + 1])
            inside &= static + self.problem.in_flight[s] * stash <= self.room[s]
            slowest = np.maximum(self.best[s, i], cost)
            better = inside & (slowest < self.best[s + 1, larger])
            self.best[s + 1, larger[better]] = slowest[better]
            self.source[s + 1, larger[better]] = i
        return work_s

    def _cost(self, i: int, larger: _Ints) -> _Floats:
        """Seconds of stages that hold what each larger ideal has and ideal i has not."""
        cross = np.flatnonzero(self.crossing[:, i])
        made, read = self.made[np.ix_(cross, larger)], self.read[np.ix_(cross, larger)]
        send_s, receive_s = self.send_s[cross, None], self.receive_s[cross, None]
        assumed = np.where(made, send_s * (read < self.size[cross, None]), receive_s * (read > 0))
        elsewhere = self.made[cross, i][:, None] | ~made  # the source is not on the stage
        newly_read = read > self.read[cross, i][:, None]
        actual = np.where(elsewhere, receive_s * newly_read, send_s)
        cost: _Floats = self.alone_s[larger] - self.seconds[i] + (actual - assumed).sum(axis=0)
        return cost

    def stages(self) -> tuple[int, ...]:
        """Per unit, of the best division."""
        stage = np.zeros(self.problem.n_units, dtype=int)
        ideal = len(self.seconds) - 1
        for s in reversed(range(self.problem.n_stages)):
            smaller = int(self.source[s + 1, ideal])
            stage[self.member[ideal] & ~self.member[smaller]] = s
            ideal = smaller
        return tuple(stage.tolist())


def _members(ideals: list[int], n: int) -> npt.NDArray[np.bool_]:
    width = (n + 7) // 8
    data = b"".join(ideal.to_bytes(width, "little") for ideal in ideals)
    table = np.frombuffer(data, dtype=np.uint8).reshape(len(ideals), width)
    return np.unpackbits(table, axis=1, bitorder="little")[:, :n].astype(bool)


def _packed(member: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    """Rows as 64-bit words."""
    rows, n = member.shape
    padded = np.zeros((rows, (n + 63) // 64 * 64), dtype=bool)
    padded[:, :n] = member
    return np.packbits(padded, axis=1).view(np.uint64)

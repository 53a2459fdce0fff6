"""What runs of consecutive units cost on each stage, and the best way to cut a line of units.

A segment [i, j) holds the positions i to j − 1 of a line; a position is a unit, or a group that
stays together. With options and memory, the time of a segment is a multiple-choice knapsack: a
Lagrangian bound is there for all segments at once, the exact value for one start at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...compiler.ir.problem import Kept, Problem, Value

Floats = npt.NDArray[np.float64]
_MULTIPLIERS = 24


@dataclass(frozen=True)
class Table:
    """Of every unit's options on a stage, [unit, option].

    Attributes:
        held, times: bytes and seconds; infinite for options that a unit lacks.
        rates: `exchange_rates`.
        fastest: per unit the number of the fastest option; of several that which holds least.
    """

    held: Floats
    times: Floats
    rates: list[float]
    fastest: list[int]


PREVIOUS, EARLIER, NEXT, LATER = range(4)


class Line:
    """A problem along an order of its units.

    Attributes:
        positions: groups of units, in order.
        transfer_s: per stage, [i, j]: what the segment sends and receives at least (`Transfers`).
        once_bytes, microbatch_bytes: [i, j]: shared bytes that no option decides.
        linked: per kept item that options decide, its number in the problem.
    """

    def __init__(self, problem: Problem, positions: Sequence[Sequence[int]]) -> None:
        self.problem = problem
        self.positions: Sequence[Sequence[int]] = [tuple(units) for units in positions]
        self.place = {u: p for p, units in enumerate(self.positions) for u in units}
        self.n = len(self.positions)
        self._alone = all(len(units) == 1 for units in self.positions)
        self._order = [u for units in self.positions for u in units]
        self.tables: dict[tuple[int, int], Table] = {}
        self._lights: dict[int, npt.NDArray[np.bool_]] = {}
        self.transfer_s = self._transfers(problem.values).on_stages(problem)
        self.linked = [
            number
            for number, kept in enumerate(problem.kept)
            if kept.unless or any(which is not None for _, which in kept.users)
        ]
        decided = set(self.linked)
        fixed = [kept for number, kept in enumerate(problem.kept) if number not in decided]
        self.once_bytes = self._shared(kept for kept in fixed if not kept.per_microbatch)
        self.microbatch_bytes = self._shared(kept for kept in fixed if kept.per_microbatch)

    def sums(self, per_unit: Sequence[float] | Floats) -> Floats:
        """[i, j]: the sum of a quantity over the segment's units."""
        total = np.zeros(self.n + 1)
        if self._alone:
            total[1:] = np.cumsum(np.asarray(per_unit)[self._order])
        else:
            each = [math.fsum(per_unit[u] for u in units) for units in self.positions]
            total[1:] = np.cumsum(each)
        return total[None, :] - total[:, None]

    def largest(self, per_unit: Floats) -> Floats:
        """[i, j]: the largest of a quantity over the segment's units."""
        table = np.zeros((self.n + 1, self.n + 1))
        if self._alone:
            each = per_unit[self._order]
        else:
            each = np.array([max(per_unit[u] for u in units) for units in self.positions])
        for i in range(self.n):
            table[i, i + 1 :] = np.maximum.accumulate(each[i:])
        return table

    def allowed(self, stage: int) -> npt.NDArray[np.bool_]:
        """[i, j]: the segment is not reversed, has enough units, and no pin keeps it away."""
        units = self.sums([1.0] * self.problem.n_units)
        foreign = [0.0] * self.problem.n_units
        for unit, pinned in self.problem.pins.items():
            foreign[unit] = float(pinned != stage)
        ordered = np.triu(np.ones((self.n + 1, self.n + 1), dtype=bool))
        result: npt.NDArray[np.bool_] = (
            ordered & (units >= self.problem.min_units - 0.5) & (self.sums(foreign) < 0.5)
        )
        return result

    def fixed_bytes(self, stage: int) -> Floats:
        """[i, j]: shared bytes that no option decides, and the stage's reserve."""
        shared = self.once_bytes + self.problem.in_flight[stage] * self.microbatch_bytes
        return shared + self.problem.reserve_bytes[stage]

    def _transfers(self, values: Sequence[Value]) -> Transfers:
        sent = _Area(self.n)
        seconds, counts = ([_Area(self.n) for _ in range(4)] for _ in range(2))
        for value in values:
            source = self.place[value.source]
            readers = sorted({self.place[reader] for reader in value.readers} - {source})
            if not readers:
                continue
            low, high = min(source, readers[0]), max(source, readers[-1])
            sent.add(0, source, source + 1, self.n, value.send_s)
            sent.add(0, low, high + 1, self.n, -value.send_s)
            amounts = value.receive_s, float(value.send_s + value.receive_s > 0)
            for where, i, last_i, j, last_j in self._received(source, readers):
                for areas, amount in zip((seconds, counts), amounts, strict=True):
                    areas[where].add(i, last_i, j, last_j, amount)
        received, counted = ([area.total() for area in areas] for areas in (seconds, counts))
        return Transfers(sent.total(), tuple(received), tuple(counted))

    def _received(
        self, source: int, readers: Sequence[int]
    ) -> Iterator[tuple[int, int, int, int, int]]:
        """The segments that receive a value: from where, as `Transfers` has it, and a rectangle."""
        later = [source, *(r for r in readers if r > source)]
        for last, r in itertools.pairwise(later):
            first = last + 1
            if last == source:
                yield PREVIOUS, first, first, r + 1, self.n
                first += 1
            if first <= r:
                yield EARLIER, first, r, r + 1, self.n
        earlier = [*(r for r in readers if r < source), source]
        for r, last in itertools.pairwise(earlier):
            final = last
            if last == source:
                yield NEXT, 0, r, final, final
                final -= 1
            if r + 1 <= final:
                yield LATER, 0, r, r + 1, final

    def light(self, stage: int) -> npt.NDArray[np.bool_]:
        """[i, j]: the segment's fastest options are sure to fit: no others need be looked at."""
        if stage not in self._lights:
            problem, table = self.problem, option_table(self, stage)
            chosen = [each[k] for each, k in zip(problem.options, table.fastest, strict=True)]
            peak = self.largest(np.array([each.transient_bytes for each in chosen]))
            once, often = self._most_linked
            held = self.sums(table.held[np.arange(problem.n_units), table.fastest])
            most = held + peak + self.fixed_bytes(stage) + once + problem.in_flight[stage] * often
            self._lights[stage] = most <= problem.budget_bytes[stage]
        return self._lights[stage]

    @cached_property
    def _most_linked(self) -> tuple[Floats, Floats]:
        """[i, j]: of shared bytes that options decide, all that these may be: held once, and by
        every microbatch."""
        linked = [self.problem.kept[number] for number in self.linked]
        once, often = ([x for x in linked if x.per_microbatch is each] for each in (False, True))
        return self._shared(once), self._shared(often)

    def _shared(self, some: Iterable[Kept]) -> Floats:
        area = _Area(self.n)
        for kept in some:
            users = sorted({self.place[unit] for unit, _ in kept.users})
            for before, r in zip([-1, *users], users, strict=False):
                area.add(before + 1, r, r + 1, self.n, kept.bytes)
        return area.total()


@dataclass(frozen=True)
class Transfers:
    """[i, j]: what a segment has to do with those before and after it.

    Attributes:
        sent: seconds in which it sends.
        received: seconds in which it receives what was made right before it, `EARLIER` than that,
            right behind it, `LATER` than that.
        counts: of such values.
    """

    sent: Floats
    received: tuple[Floats, ...]
    counts: tuple[Floats, ...]

    def on_stages(self, problem: Problem) -> list[Floats]:
        """Per stage, the least seconds that all of it takes.

        Which stage a value comes from no segment tells, only whether it is an earlier or a later
        one, but for what is made next to it. Where links are not alike the best of those stages is
        taken for it, so that it is the truth where values go from a stage to the next.
        """
        if not problem.links:
            return [sum(self.received, self.sent)] * problem.n_stages
        return [self._over(problem, s) for s in range(problem.n_stages)]

    def _over(self, problem: Problem, stage: int) -> Floats:
        stages = range(problem.n_stages)
        out = [problem.link(stage, other).slower for other in stages if other != stage]
        total = self.sent * min(out, default=1.0)
        before, after = stages[:stage], stages[stage + 1 :]
        filled = problem.min_units > 0  # or the neighbour may be farther away
        for near, far, sources, neighbour in (
            (PREVIOUS, EARLIER, before, before[-1:]),
            (NEXT, LATER, after, after[:1]),
        ):
            if not sources:
                continue
            latency_s = np.zeros_like(total)
            for where, some in ((far, sources), (near, neighbour if filled else sources)):
                links = [problem.link(source, stage) for source in some]
                total = total + self.received[where] * min(link.slower for link in links)
                least_s = min(link.latency_s for link in links)
                latency_s = np.where(self.counts[where] > 0.5, least_s, latency_s)
            total += latency_s
        return total


class _Area:
    """A table [i, j] to which rectangles are added."""

    def __init__(self, n: int) -> None:
        self.steps = np.zeros((n + 2, n + 2))

    def add(self, i: int, last_i: int, j: int, last_j: int, amount: float) -> None:
        self.steps[i, j] += amount
        self.steps[last_i + 1, j] -= amount
        self.steps[i, last_j + 1] -= amount
        self.steps[last_i + 1, last_j + 1] += amount

    def total(self) -> Floats:
        full: Floats = self.steps.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
        return np.maximum(full, 0.0)


@dataclass(frozen=True)
class Division:
    """Where a line is cut: stage s has the positions ``cuts[s]`` to ``cuts[s + 1]`` − 1."""

    objective: float
    cuts: tuple[int, ...]

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """(stage, i, j)."""
        return ((s, *ends) for s, ends in enumerate(zip(self.cuts, self.cuts[1:], strict=False)))


def best_division(costs: Sequence[Floats], max_weight: float, sum_weight: float) -> Division | None:
    """The cuts with the smallest max_weight · max + sum_weight · Σ of the segments' costs.

    The smallest sum for a limit on the largest cost is one dynamic program; limits that could
    still pay are tried from the loosest one down.

    Args:
        costs: per stage, [i, j]; infinite where a segment is not allowed.
    """
    lowest = _smallest_max(costs)
    if not math.isfinite(lowest):
        return None
    best = _smallest_sum(costs, lowest * (1 + 1e-12))
    if best is None:
        return None

    def valued(found: Division) -> Division:
        each = [costs[s][i, j] for s, i, j in found.segments()]
        return Division(max_weight * max(each) + sum_weight * math.fsum(each), found.cuts)

    best = valued(best)
    free = _smallest_sum(costs) if sum_weight else None
    if free is None:
        return best
    slack = best.objective - sum_weight * free.objective
    limit = slack / max_weight if max_weight else math.inf
    while (found := _smallest_sum(costs, limit)) is not None:
        if max_weight * lowest + sum_weight * found.objective >= best.objective * (1 - 1e-12):
            break
        best = min(best, valued(found), key=lambda division: division.objective)
        largest = max(costs[s][i, j] for s, i, j in found.segments())
        limit = largest * (1 - 1e-9)
    return best


def most_even(costs: Sequence[Floats], limit: float) -> Division | None:
    """The cuts with the smallest sum of squares where no segment costs more than a limit; None if
    there are none."""
    return _smallest_sum([np.where(cost <= limit, cost * cost, math.inf) for cost in costs])


def ends_within(costs: Sequence[Floats], limit: float) -> list[int]:
    """Per stage, its first end from which the later stages can go on within a limit each."""
    n = len(costs[0]) - 1
    reached: npt.NDArray[np.bool_] = np.arange(n + 1) == n
    ends = [n]
    for cost in reversed(costs[1:]):
        reached = np.any((cost <= limit) & reached[None, :], axis=1)
        ends.append(int(reached.argmax()) if reached.any() else n)
    return ends[::-1]


def _smallest_max(costs: Sequence[Floats]) -> float:
    reached = costs[0][0]
    for cost in costs[1:]:
        reached = np.maximum(reached[:, None], cost).min(axis=0)
    return float(reached[-1])


def _smallest_sum(costs: Sequence[Floats], limit: float = math.inf) -> Division | None:
    """The cuts with the smallest sum where no segment costs more than a limit."""
    reached = np.where(costs[0][0] <= limit, costs[0][0], math.inf)
    sources = []
    for cost in costs[1:]:
        total = reached[:, None] + np.where(cost <= limit, cost, math.inf)
        sources.append(total.argmin(axis=0))
        reached = total.min(axis=0)
    if not math.isfinite(reached[-1]):
        return None
    cuts = [len(reached) - 1]
    for source in reversed(sources):
        cuts.append(int(source[cuts[-1]]))
    return Division(float(reached[-1]), (0, *reversed(cuts)))


class Segments(Protocol):
    """Sets of units that a stage may hold, numbered from i to j: runs of a line, or what one ideal
    has and a smaller one has not."""

    problem: Problem
    positions: Sequence[Sequence[int]]
    transfer_s: list[Floats]
    linked: list[int]
    tables: dict[tuple[int, int], Table]

    def sums(self, per_unit: Sequence[float] | Floats) -> Floats: ...

    def largest(self, per_unit: Floats) -> Floats: ...

    def allowed(self, stage: int) -> npt.NDArray[np.bool_]: ...

    def fixed_bytes(self, stage: int) -> Floats: ...


def lower_bounds(line: Segments, stage: int) -> Floats:
    """[i, j]: no options of the segment fit in less time (infinite: none fit).

    Lagrange: for every multiplier λ ≥ 0, min Σ seconds ≥ min Σ (seconds + λ · bytes) − λ · room.
    """
    problem, transfer_s = line.problem, line.transfer_s[stage]
    seconds = line.sums(problem.fewest_s(problem.kind_of(stage)))
    bounds = np.where(line.allowed(stage), seconds, math.inf)
    budget = problem.budget_bytes[stage]
    if not math.isfinite(budget):
        return bounds + transfer_s
    table = option_table(line, stage)
    peak = np.array([min(o.transient_bytes for o in each) for each in problem.options])
    room = budget - line.fixed_bytes(stage) - line.largest(peak)
    fewest = line.sums(table.held.min(axis=1))
    bounds[fewest > room + 1e-9 * budget] = math.inf
    for rate in table.rates:
        relaxed = (table.times + rate * table.held).min(axis=1)
        bounds = np.maximum(bounds, line.sums(relaxed) - rate * room)
    return bounds + transfer_s


def option_table(line: Segments, stage: int) -> Table:
    """What is known of every unit's options on a stage."""
    problem = line.problem
    key = problem.in_flight[stage], problem.kind_of(stage)
    if key not in line.tables:
        most = max(len(each) for each in problem.options)
        held = np.full((problem.n_units, most), math.inf)
        times = held.copy()
        for unit, each in enumerate(problem.options):
            for k, option in enumerate(each):
                held[unit, k] = option.static_bytes + key[0] * option.stash_bytes
                times[unit, k] = option.on(key[1])
        fastest = [
            min(range(len(each)), key=lambda k: (times[u, k], held[u, k], each[k].transient_bytes))
            for u, each in enumerate(problem.options)
        ]
        line.tables[key] = Table(held, times, exchange_rates(held, times), fastest)
    return line.tables[key]


def exchange_rates(held: Floats, times: Floats) -> list[float]:
    """Seconds per byte at which units change their option: quantiles of all such rates."""
    fastest = times.argmin(axis=1)[:, None]
    saved = np.take_along_axis(held, fastest, 1) - np.where(np.isfinite(held), held, math.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = (times - np.take_along_axis(times, fastest, 1)) / saved
    rates = rates[(saved > 0) & np.isfinite(rates) & (rates > 0)]
    if not rates.size:
        return []
    return sorted(set(np.quantile(rates, np.linspace(0, 1, _MULTIPLIERS)).tolist()))

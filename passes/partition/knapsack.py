"""The options of a run of units that take the least time within a stage's memory, exactly.

Units are added one by one; what is kept are (seconds, bytes, transient) that no other choice
beats and from which the rest can still be added in time and memory. Shared bytes that options
decide (`Kept.users`, `Kept.unless`) couple units: choices that differ in what an open item has
seen so far are not compared. Where choices get too many, those of nearly the same time are
replaced by the one of them with the fewest bytes, and the time that this can cost is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...compiler.ir.problem import Kept
from ..integer.work import Work
from .segments import Floats, Segments, option_table

Ints = npt.NDArray[np.int_]
State = tuple[tuple[int, bool], ...]
"""(kept item, whether it is recomputed rather than used), of items that later units touch too."""

Effect = tuple[tuple[int, bool], ...]
"""What an option does to kept items, in the same form."""


_RATES = 8
_FRONT_S, _CHOICE_S = 2e-4, 1e-6  # work: of a front, of a choice in it


@dataclass(frozen=True)
class _Front:
    """Choices of which none beats another, by seconds.

    Attributes:
        held: bytes, items apart that are still open.
        peak: largest transient bytes.
        state, parent: the state and number of the choice that this one extends.
        option: of the last unit.
    """

    seconds: Floats
    held: Floats
    peak: Floats
    state: Ints
    parent: Ints
    option: Ints


Fronts = dict[State, _Front]
_Limit = tuple[float, float, float]
"""(a, b, c): choices with a · seconds + b · bytes > c are dropped."""


@dataclass
class Knapsack:
    """Least seconds of segments of a line on one stage.

    Attributes:
        cap: most choices that are kept, roughly; more is more exact and slower.
    """

    line: Segments
    stage: int
    cap: int
    steps: dict[int, list[tuple[Effect, Ints, Floats, Floats, Floats]]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        problem = self.line.problem
        self.in_flight, self.kind = problem.in_flight[self.stage], problem.kind_of(self.stage)
        self.room = problem.budget_bytes[self.stage] * (1 + 1e-10)
        self.fixed = self.line.fixed_bytes(self.stage)
        linked = {number: problem.kept[number] for number in self.line.linked}
        self.sizes = {
            number: kept.bytes * (self.in_flight if kept.per_microbatch else 1)
            for number, kept in linked.items()
        }
        order = [u for units in self.line.positions for u in units]
        self.rank = {u: r for r, u in enumerate(order)}
        self.ends = np.cumsum([0, *(len(units) for units in self.line.positions)])
        self.least = self._least()
        self.relaxed = [
            (rate, np.concatenate(([0.0], np.cumsum(each[order])))) for rate, each in self.least
        ]
        self.closes: dict[int, set[int]] = {}  # unit -> items that no later unit touches
        for number, kept in linked.items():
            last = max((u for u, _ in (*kept.users, *kept.unless)), key=self.rank.__getitem__)
            self.closes.setdefault(last, set()).add(number)
        self.touched: dict[int, dict[int, Kept]] = {}
        for number, kept in linked.items():
            for unit, _ in (*kept.users, *kept.unless):
                self.touched.setdefault(unit, {})[number] = kept

    def _least(self) -> list[tuple[float, Floats]]:
        """(rate, each unit's least seconds + rate · bytes); ∞: bytes alone."""
        table = option_table(self.line, self.stage)
        held, times, rates = table.held, table.times, table.rates
        chosen = rates[:: max(1, len(rates) // _RATES)]
        least = [(0.0, times.min(axis=1)), (math.inf, held.min(axis=1))]
        return least + [(rate, (times + rate * held).min(axis=1)) for rate in chosen]

    def seconds(
        self, i: int, first_end: int, limit_s: float, work: Work | None = None
    ) -> tuple[Floats, Floats]:
        """Least option seconds of [i, j) that fit, per end j; and what they may be too high by.

        Infinite before ``first_end``, and where they would be above ``limit_s``.
        """
        least = np.full(len(self.line.positions) + 1, math.inf)
        error = np.zeros(len(self.line.positions) + 1)
        if first_end <= i:
            least[i] = 0.0
        for j, history, lost in self._grown(i, first_end, limit_s):
            if work is not None:
                work.spend(work_of(history[-len(self.line.positions[j - 1]) :]))
            if j >= first_end:
                fitting = self._fitting(history[-1], self.fixed[i, j])
                least[j] = min((found[0] for found in fitting), default=math.inf)
                error[j] = lost
        return least, error

    def options(self, i: int, j: int, limit_s: float = math.inf) -> dict[int, int] | None:
        """The options that take the least seconds on [i, j); None if none fit below a limit."""
        grown = self._grown(i, j, limit_s)
        history = next((steps for end, steps, _ in grown if end == j), None)
        units = [u for units in self.line.positions[i:j] for u in units]
        return self._chosen(units, history or [], self.fixed[i, j])

    def _chosen(
        self, units: Sequence[int], history: Sequence[Fronts], fixed: float
    ) -> dict[int, int] | None:
        """The options of the fastest choice that fits, from the fronts after every unit."""
        if not units:
            return {}
        ends = list(self._fitting(history[-1], fixed)) if history else []
        if not ends:
            return None
        _, state, choice = min(ends)
        chosen = {}
        for unit, fronts in zip(reversed(units), reversed(history), strict=True):
            front = list(fronts.values())[state]
            chosen[unit] = int(front.option[choice])
            state, choice = int(front.state[choice]), int(front.parent[choice])
        return chosen

    def between(
        self, units: Sequence[int], fixed: float, limit_s: float, work: Work
    ) -> tuple[float, float]:
        """Least option seconds of any units, in the line's order; what they may be too high by.

        Infinite where none fit, or where they would be above ``limit_s``.

        Args:
            fixed: bytes that no option decides.
        """
        history, lost = self._walked(units, fixed, limit_s)
        work.spend(work_of(history))
        fitting = self._fitting(history[-1], fixed)
        return min((found[0] for found in fitting), default=math.inf), lost

    def chosen(self, units: Sequence[int], fixed: float, limit_s: float) -> dict[int, int] | None:
        """Their options with the least seconds; None if none fit below a limit."""
        return self._chosen(units, self._walked(units, fixed, limit_s)[0][1:], fixed)

    def _walked(
        self, units: Sequence[int], fixed: float, limit_s: float
    ) -> tuple[list[Fronts], float]:
        """Fronts before and after every unit; lost seconds."""
        history, lost = [nothing()], 0.0
        each = [least[list(units)] for _, least in self.least]
        later = [least.sum() - np.cumsum(least) for least in each]
        for place, unit in enumerate(units):
            limits = self._limits([rest[place] for rest in later], self.room - fixed, limit_s)
            fronts, more = self._extended(history[-1], unit, limits)
            history.append(fronts)
            lost += more
        return history, lost

    def _fitting(self, fronts: Fronts, fixed: float) -> Iterator[tuple[float, int, int]]:
        """(seconds, number of the state, number in its front) of each state's fastest that fits."""
        for number, (state, front) in enumerate(fronts.items()):
            open_bytes = sum(self.sizes[item] for item, recomputed in state if not recomputed)
            used = front.held + front.peak + open_bytes + fixed
            fit = np.flatnonzero(used <= self.room)
            if fit.size:
                yield float(front.seconds[fit[0]]), number, int(fit[0])

    def _grown(
        self, i: int, first_end: int, limit_s: float
    ) -> Iterator[tuple[int, list[Fronts], float]]:
        """(j, fronts after every unit of [i, j), lost seconds) while there is a choice left."""
        fronts = nothing()
        history: list[Fronts] = []
        lost = 0.0
        for j in range(i + 1, len(self.line.positions) + 1):
            end = max(j, first_end)
            room = self.room - self.fixed[i, end]
            for unit in self.line.positions[j - 1]:
                after, last = self.rank[unit] + 1, self.ends[end]
                rest = [done[last] - done[after] for _, done in self.relaxed]
                limits = self._limits(rest, room, limit_s)
                fronts, more = self._extended(fronts, unit, limits)
                lost += more
                history.append(fronts)
            if not fronts:
                return
            yield j, history, lost

    def _limits(self, rest: Sequence[float], room: float, limit_s: float) -> list[_Limit]:
        """What seconds + rate · bytes may be after a unit, for the rest to fit.

        Args:
            rest: per rate, what the later units take at least.
        """
        limits = []
        for (rate, _), later in zip(self.least, rest, strict=True):
            if math.isfinite(rate):
                top = limit_s + rate * room if math.isfinite(limit_s) else math.inf
                limits.append((1.0, rate, top - later))
            else:
                limits.append((0.0, 1.0, room - later))
        return limits

    def _extended(self, fronts: Fronts, unit: int, limits: list[_Limit]) -> tuple[Fronts, float]:
        """Every choice with every option of one more unit; the seconds that merging lost."""
        found: dict[State, list[_Front]] = {}
        for number, (state, front) in enumerate(fronts.items()):
            for effect, options, seconds, held, peak in self._step(unit):
                after, added = self._closed(unit, state, effect)
                count = len(options)
                longer = _Front(
                    (front.seconds[:, None] + seconds).ravel(),
                    (front.held[:, None] + (held + added)).ravel(),
                    np.maximum(front.peak[:, None], peak).ravel(),
                    np.full(len(front.seconds) * count, number),
                    np.repeat(np.arange(len(front.seconds)), count),
                    np.tile(options, len(front.seconds)),
                )
                found.setdefault(after, []).append(longer)
        result, lost = {}, 0.0
        for state, parts in found.items():
            best, width = self._pruned(parts, limits)
            if best is not None:
                result[state] = best
                lost = max(lost, width)
        return result, lost

    def _step(self, unit: int) -> list[tuple[Effect, Ints, Floats, Floats, Floats]]:
        """A unit's options by what they do to kept items: (effect, options, s, bytes, peak)."""
        if unit in self.steps:
            return self.steps[unit]
        each = self.line.problem.options[unit]
        groups: dict[Effect, list[int]] = {}
        for k in range(len(each)):
            effect = []
            for number, kept in self.touched.get(unit, {}).items():
                for users, recomputed in ((kept.unless, True), (kept.users, False)):
                    if any(u == unit and (which is None or k in which) for u, which in users):
                        effect.append((number, recomputed))
                        break
            groups.setdefault(tuple(effect), []).append(k)
        self.steps[unit] = [
            (
                effect,
                np.array(ks),
                np.array([each[k].on(self.kind) for k in ks]),
                np.array([each[k].static_bytes + self.in_flight * each[k].stash_bytes for k in ks]),
                np.array([each[k].transient_bytes for k in ks]),
            )
            for effect, ks in groups.items()
        ]
        return self.steps[unit]

    def _closed(self, unit: int, state: State, effect: Effect) -> tuple[State, float]:
        """The state after a unit, and the bytes of the items that it closes."""
        seen = dict(state)
        for item, recomputed in effect:
            seen[item] = seen.get(item, False) or recomputed
        added = 0.0
        for item in self.closes.get(unit, ()):
            if item in seen and not seen.pop(item):
                added += self.sizes[item]
        return tuple(sorted(seen.items())), added

    def _pruned(self, parts: list[_Front], limits: list[_Limit]) -> tuple[_Front | None, float]:
        seconds = np.concatenate([part.seconds for part in parts])
        held = np.concatenate([part.held for part in parts])
        peak = np.concatenate([part.peak for part in parts])
        fits = np.ones(len(seconds), dtype=bool)
        for per_second, rate, top in limits:
            if math.isfinite(top):
                slack = 1e-9 * (abs(top) + rate * self.room)
                fits &= per_second * seconds + rate * (held + peak) <= top + slack
        fit = np.flatnonzero(fits)
        if not fit.size:
            return None, 0.0
        fit = fit[np.lexsort((peak[fit], held[fit], seconds[fit]))]
        fit = fit[_undominated(held[fit], peak[fit])]
        width = 0.0
        if len(fit) > self.cap:
            levels = np.unique(peak[fit], return_inverse=True)[1]
            width = float(seconds[fit[-1]] - seconds[fit[0]]) * (levels.max() + 1) / self.cap
            bucket = np.floor((seconds[fit] - seconds[fit[0]]) / width).astype(int)
            same = bucket * (levels.max() + 1) + levels
            last = len(same) - 1 - np.unique(same[::-1], return_index=True)[1]
            fit = fit[np.sort(last)]  # of one level, later is slower and smaller
        best = _Front(
            seconds[fit],
            held[fit],
            peak[fit],
            np.concatenate([part.state for part in parts])[fit],
            np.concatenate([part.parent for part in parts])[fit],
            np.concatenate([part.option for part in parts])[fit],
        )
        return best, width


def nothing() -> Fronts:
    """The one choice for no unit."""
    none, zero = np.zeros(1, dtype=int), np.zeros(1)
    return {(): _Front(zero, zero, zero, none, none, none)}


def work_of(steps: Sequence[Fronts]) -> float:
    """Of making these, in seconds."""
    return sum(_FRONT_S + _CHOICE_S * len(f.seconds) for each in steps for f in each.values())


def _undominated(held: Floats, peak: Floats) -> npt.NDArray[np.bool_]:
    """Which of some choices, sorted by seconds, no earlier one beats in both kinds of bytes."""
    keep = np.zeros(len(held), dtype=bool)
    for level in np.unique(peak):
        lower = np.where(peak <= level, held, math.inf)
        before = np.concatenate(([math.inf], np.minimum.accumulate(lower)[:-1]))
        keep |= (peak == level) & (held < before * (1 - 1e-12))
    return keep

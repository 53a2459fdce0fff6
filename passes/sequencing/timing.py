"""How long an order takes: every step as early as the order lets it."""

from __future__ import annotations

from dataclasses import dataclass

from .problem import B, F, Order, Problem, W

Place = tuple[int, int]
"""(rank, position in its order)"""
Span = tuple[float, float]
"""What counts, in seconds, and what decides where that is the same; the smaller one is better."""


@dataclass(frozen=True)
class Times:
    """When every step starts and ends; per rank and position.

    Attributes:
        waited: the place of the step whose message it waited for, if that came after its rank was
            free; None if it waited for its rank.
        by_end: the last end counts, and not the longest rank.
    """

    starts: list[list[float]]
    ends: list[list[float]]
    waited: list[list[Place | None]]
    by_end: bool

    @property
    def longest_s(self) -> float:
        """Over the ranks, the longest time from the first start to the last end."""
        return max(self._spans())

    @property
    def end_s(self) -> float:
        """From the first start of any rank to the last end of any."""
        return max(row[-1] for row in self.ends if row) if any(self.ends) else 0.0

    @property
    def span(self) -> Span:
        pair = (self.longest_s, self.end_s)
        return pair[::-1] if self.by_end else pair

    def critical(self) -> list[Place]:
        """From the last step of the rank that decides, back through what each waited for."""
        last = [row[-1] if row else 0.0 for row in self.ends] if self.by_end else self._spans()
        rank = last.index(max(last))
        i = len(self.ends[rank]) - 1
        path = []
        while i >= 0:
            path.append((rank, i))
            rank, i = self.waited[rank][i] or (rank, i - 1)
        return path

    def _spans(self) -> list[float]:
        rows = zip(self.starts, self.ends, strict=True)
        return [ends[-1] - starts[0] if ends else 0.0 for starts, ends in rows]


def times_of(problem: Problem, order: Order) -> Times | None:
    """None where steps wait for each other in a circle."""
    made: list[list[list[tuple[float, Place]]]] = [[[] for _ in problem.homes] for _ in (F, B)]
    seconds, before = problem.seconds, problem.before
    ranks = range(len(order))
    times = Times([[] for _ in ranks], [[] for _ in ranks], [[] for _ in ranks], problem.by_end)
    awake = list(ranks)[::-1]
    asleep: dict[tuple[int, int, int], list[int]] = {}
    while awake:
        rank = awake.pop()
        steps, starts, ends = order[rank], times.starts[rank], times.ends[rank]
        now = ends[-1] if ends else 0.0
        for i in range(len(ends), len(steps)):
            step = kind, stage, microbatch = steps[i]
            start, waited = now, None
            for other, under_way in before[kind][stage] if kind != W else ():
                senders = made[kind][other]
                if len(senders) <= microbatch:
                    asleep.setdefault((kind, other, microbatch), []).append(rank)
                    break
                end, place = senders[microbatch]
                if end + under_way > start:
                    start, waited = end + under_way, place
            else:
                now = start + seconds[kind][stage]
                starts.append(start)
                ends.append(now)
                times.waited[rank].append(waited)
                if kind != W:
                    made[kind][stage].append((now, (rank, i)))
                    awake += asleep.pop(step, ())
                continue
            break
    done = all(len(a) == len(b) for a, b in zip(times.ends, order, strict=True))
    return times if done else None


def is_best(problem: Problem, span: Span) -> bool:
    """Whether nothing can be shorter: no rank waits once it could begin, or none that decides."""
    at, begins = 0.0, []
    for stage, forward in enumerate(problem.forward_s):
        if stage:
            at += problem.before[F][stage][-1][1]
        begins.append(at)
        at += forward
    work = [
        problem.microbatches * sum(row[s] for row in _counted(problem) for s in stages)
        for stages in problem.placement
    ]
    ends = (begins[stages[0]] + x for stages, x in zip(problem.placement, work, strict=True))
    pair = (max(work), max(ends))
    least = pair[::-1] if problem.by_end else pair
    return all(a <= b * (1 + 1e-9) for a, b in zip(span, least, strict=True))


def _counted(problem: Problem) -> list[tuple[float, ...]]:
    weight = tuple(
        w if split else 0.0 for w, split in zip(problem.weight_s, problem.splits, strict=True)
    )
    return [problem.forward_s, problem.backward_s, weight]

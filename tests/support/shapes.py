"""Shapes of pipelines for tests of schedules, drawn and made; their times by the simulator."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st
from pipecompile.compiler.ir.actions import Kind, Schedule
from pipecompile.compiler.ir.graph import Phase
from pipecompile.compiler.ir.program import Message
from pipecompile.passes.generators.sequenced import order_of, problem_of
from pipecompile.passes.generators.shape import Homes, PipelineShape, StageCosts, looped
from pipecompile.passes.schedule.communication import add_communication
from pipecompile.passes.schedule.registry import ScheduleKind
from pipecompile.passes.schedule.simulate import Timeline, simulate


def chain(n_stages: int) -> list[Message]:
    """Neighbours talk, both ways."""
    there = [Message(s, s + 1, Phase.FORWARD, ()) for s in range(n_stages - 1)]
    return there + [Message(s + 1, s, Phase.BACKWARD, ()) for s in range(n_stages - 1)]


@st.composite
def routes(draw: st.DrawFn, n_stages: int) -> list[Message]:
    """Neighbours always talk; some pairs further apart do too."""
    far = [(a, b) for a in range(n_stages) for b in range(a + 2, n_stages)]
    pairs = sorted(set(draw(st.lists(st.sampled_from(far), max_size=3)))) if far else []
    forward = [Message(a, b, Phase.FORWARD, ()) for a, b in pairs]
    return chain(n_stages) + forward + [Message(b, a, Phase.BACKWARD, ()) for a, b in pairs]


def costs_of(
    homes: Homes,
    seconds: Sequence[Sequence[float]],
    transfer_s: float = 0.0,
    limit: float | None = None,
    carry: float = 1.0,
) -> StageCosts:
    """What F, B and W of each stage take; each stashes 1, and ranks hold ``limit`` of theirs."""
    n, ranks = len(homes), max(homes) + 1
    forward, backward, weight = (tuple(map(float, row)) for row in seconds)
    between = {(s, s + d): transfer_s for s in range(n) for d in (1, -1) if 0 <= s + d < n}
    limits = () if limit is None else (limit * (n // ranks),) * ranks
    return StageCosts(forward, backward, weight, (1.0,) * n, (carry,) * n, between, limits)


@st.composite
def unequal(draw: st.DrawFn, homes: Homes, limits: bool = True) -> StageCosts:
    """Any seconds and bytes; limits from the least that there can be on."""
    n, ranks = len(homes), max(homes) + 1
    numbers = lambda low, high: tuple(  # noqa: E731
        float(x) for x in draw(st.lists(st.integers(low, high), min_size=n, max_size=n))
    )
    stash, carry = numbers(1, 9), numbers(0, 12)
    pairs = [(s, s + d) for s in range(n) for d in (1, -1) if 0 <= s + d < n]
    between = {pair: float(draw(st.integers(0, 5))) for pair in pairs}
    held = [[s for s in range(n) if homes[s] == rank] for rank in range(ranks)]
    least = [
        max(sum(stash[s] for s in row if s < deep) + max(stash[deep], carry[deep]) for deep in row)
        for row in held
    ]
    least = [max(x, sum(stash[s] for s in row)) for x, row in zip(least, held, strict=True)]
    more = draw(st.lists(st.integers(0, 60), min_size=ranks, max_size=ranks))
    limit = tuple(a + b for a, b in zip(least, more, strict=True)) if limits else ()
    return StageCosts(numbers(1, 20), numbers(1, 20), numbers(1, 20), stash, carry, between, limit)


def timeline(schedule: Schedule, shape: PipelineShape) -> Timeline:
    """By the simulator, with messages between neighbours."""
    problem = problem_of(shape)
    kinds = (Kind.F, Kind.B, Kind.W)
    seconds = {
        (s, kind): problem.seconds[k][s]
        for k, kind in enumerate(kinds)
        for s in range(shape.n_stages)
    }
    transfers = {(a, b): x for a, b, x in problem.transfers}
    return simulate(add_communication(schedule, chain(shape.n_stages)), seconds, transfers)


def peaks(schedule: Schedule, shape: PipelineShape) -> list[float]:
    """Per rank, the most bytes that it holds."""
    problem = problem_of(shape)
    return [problem.peak_bytes(steps) for steps in order_of(schedule)]


def alike(
    kind: ScheduleKind, ranks: int, microbatches: int, virtual: int | None = None
) -> PipelineShape:
    """All stages take the same, and all have a W where the kind has any."""
    return kind.shape(ranks, microbatches, virtual)


def profiled(
    ranks: int, microbatches: int, seconds: Sequence[float], limit: float, carry: float = 1.0
) -> PipelineShape:
    """One stage per rank, all alike: seconds of F, B, W and of a message."""
    homes = looped(ranks, 1)
    rows = [[x] * ranks for x in seconds[:3]]
    costs = costs_of(homes, rows, seconds[3], limit, carry)
    return PipelineShape(homes, microbatches, (True,) * ranks, costs)

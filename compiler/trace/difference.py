"""Predicted against measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..ir.errors import TraceError
from .figures import (
    bubble_of,
    closing_seconds,
    compute_seconds,
    sending,
    step_seconds,
    waiting,
)
from .replay import resimulated_bubble
from .trace import Header, Lane, Origin, Trace


@dataclass(frozen=True)
class Pair:
    """A number as it was predicted and as it was measured."""

    planned: float
    measured: float

    @property
    def ratio(self) -> float | None:
        """Measured to planned; None where nothing was predicted."""
        return self.measured / self.planned if self.planned else None


@dataclass(frozen=True)
class Computation:
    """Seconds of one microbatch, the median."""

    stage: int
    kind: str
    seconds: Pair


@dataclass(frozen=True)
class Waiting:
    """What a rank waits for messages per step.

    Attributes:
        seconds: for all others.
        most_for: the rank that it waits for longest; None if for none.
        most_s: so long.
        caused_s: others wait for this rank.
        sending_s: it hands messages over, which the simulator takes to cost nothing.
    """

    rank: int
    stages: tuple[int, ...]
    seconds: Pair
    most_for: int | None
    most_s: float
    caused_s: float
    sending_s: float


@dataclass(frozen=True)
class Difference:
    """A plan beside its run.

    Attributes:
        steps: how many were measured.
        step_s: from the first action to the end of the slowest optimizer.
        closing_s: of that, after the last computation.
        bubble: None where one process has played all ranks.
        simulated_bubble: what the simulator says were each computation as long as it was
            measured: what is left of the difference is not theirs.
        waiting: empty where one process has played all ranks.
        notes: what else to know.
    """

    model: str
    schedule: str
    steps: int
    step_s: Pair
    closing_s: Pair
    bubble: Pair | None
    simulated_bubble: float | None
    computations: tuple[Computation, ...]
    waiting: tuple[Waiting, ...]
    notes: tuple[str, ...]


def difference(planned: Trace, measured: Trace) -> Difference:
    """Compare a plan's trace with that of a run of the same pipeline.

    Raises:
        TraceError: they are not that, or nothing was trained.
    """
    _check(planned, measured)
    _check_whole(planned, measured)
    before, after = compute_seconds(planned), compute_seconds(measured)
    alone = measured.header.shared_thread
    return Difference(
        model=planned.header.model,
        schedule=planned.header.schedule,
        steps=len(measured.steps),
        step_s=Pair(step_seconds(planned), step_seconds(measured)),
        closing_s=Pair(closing_seconds(planned), closing_seconds(measured)),
        bubble=None if alone else Pair(bubble_of(planned), bubble_of(measured)),
        simulated_bubble=None if alone else resimulated_bubble(planned, measured),
        computations=tuple(
            Computation(stage, str(kind), Pair(seconds, after[stage, kind]))
            for (stage, kind), seconds in before.items()
        ),
        waiting=() if alone else _waiting(planned, measured),
        notes=tuple(_notes(planned.header, measured.header)),
    )


def _check(planned: Trace, measured: Trace) -> None:
    """Raises TraceError where they cannot be compared."""
    if planned.origin is measured.origin:
        both, other = (
            ("planned", "the second has to be of a run: pipe.trace()")
            if planned.origin is Origin.PLANNED
            else (
                "measured",
                "the first has to be of a plan: inspect --trace, or pipe.trace(plan=)",
            )
        )
        raise TraceError(f"both traces are {both}: {other}")
    if planned.origin is Origin.MEASURED:
        raise TraceError("the first trace is measured and the second planned: swap them")
    ours, theirs = planned.header, measured.header
    compared: tuple[tuple[str, object, object], ...] = (
        ("model", ours.model, theirs.model),
        ("stages of ranks", _placed(ours), _placed(theirs)),
        ("replicas (dp)", ours.dp, theirs.dp),
        ("microbatches", ours.microbatches, theirs.microbatches),
        ("schedule", ours.schedule, theirs.schedule),
    )
    for name, mine, ran in compared:
        if mine != ran:
            raise TraceError(
                f"the traces are of different pipelines: {name} {mine} was planned, and {ran} "
                "ran; plan what runs, as pipe.trace(plan=) does"
            )
    if ours.digest != theirs.digest:
        raise TraceError(
            "the traces are of different pipelines: their ranks compute in different orders; plan "
            "what runs, as pipe.trace(plan=) does"
        )
    if not measured.steps or not any(s.step in measured.steps for s in measured.of(Lane.COMPUTE)):
        raise TraceError("the measured trace has no training step: call step() inside pipe.trace()")


def _check_whole(planned: Trace, measured: Trace) -> None:
    """Raises TraceError where a step, or the part of a rank, is missing."""
    counts = Counter(
        (s.step, s.rank) for s in measured.of(Lane.COMPUTE) if s.step in measured.steps
    )
    per_rank = Counter(s.rank for s in planned.of(Lane.COMPUTE))
    for (step, rank), count in sorted(counts.items()):
        if count != per_rank[rank % planned.header.pp]:
            raise TraceError(
                f"rank {rank} has measured {count} of {per_rank[rank % planned.header.pp]} "
                f"computations of step {step}: compare a run in which no step fails"
            )
    lacking = planned.header.pp * planned.header.dp - len(measured.ranks)
    if lacking:
        raise TraceError(
            f"the measured trace lacks {lacking} ranks: it is a part of one that failed"
        )


def _placed(header: Header) -> str:
    return " | ".join(" ".join(map(str, stages)) for stages in header.placement)


def _waiting(planned: Trace, measured: Trace) -> tuple[Waiting, ...]:
    before, after = waiting(planned), waiting(measured)
    position_of, sent = measured.header.numbering.position_of, sending(measured)
    rows = []
    for rank in measured.ranks:
        mine = {other: seconds for (r, other), seconds in after.items() if r == rank}
        most = max(mine, key=mine.__getitem__, default=None)
        expected = sum(s for (r, _), s in before.items() if r == position_of(rank))
        rows.append(
            Waiting(
                rank,
                planned.header.placement[position_of(rank)],
                Pair(expected, sum(mine.values())),
                most,
                0.0 if most is None else mine[most],
                sum(s for (_, other), s in after.items() if other == rank),
                sent.get(rank, 0.0),
            )
        )
    return tuple(rows)


def _notes(planned: Header, measured: Header) -> list[str]:
    notes = []
    if planned.device != measured.device:
        notes.append(f"planned for {planned.device}, measured on {measured.device}")
    if planned.costs == "roofline":
        notes.append("planned seconds are peak rates: nothing runs faster than that")
    if measured.shared_thread:
        notes.append(
            "one process has played all ranks, one after another: no bubble and no waiting are "
            "measured; start as many processes as there are ranks"
        )
    if not measured.complete:
        notes.append("the measured trace ends in an error")
    return notes

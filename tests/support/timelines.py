"""Simulated steps of schedules made by hand, also of ranks with several stages."""

from __future__ import annotations

from dataclasses import replace

from pipecompile.compiler.ir.actions import Action, Kind, Schedule, to_text
from pipecompile.compiler.plan.plan import Plan, Transfer
from pipecompile.passes.schedule.simulate import Timeline, simulate

from .plans import hand_made

FORWARD_S, BACKWARD_S = 0.25, 0.5


def looped(ranks: int, virtual: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards; stage s on rank s mod p, with sends and receives."""
    last = ranks * virtual - 1
    rows = []
    for rank in range(ranks):
        row: list[Action] = []
        for stage in range(rank, last + 1, ranks):
            for i in range(microbatches):
                row += [Action(stage, Kind.RECV_F, i, stage - 1)] * (stage > 0)
                row += [Action(stage, Kind.F, i)]
                row += [Action(stage, Kind.SEND_F, i, stage + 1)] * (stage < last)
        for stage in range(rank + ranks * (virtual - 1), -1, -ranks):
            for i in range(microbatches):
                row += [Action(stage, Kind.RECV_B, i, stage + 1)] * (stage < last)
                row += [Action(stage, Kind.B, i)]
                row += [Action(stage, Kind.SEND_B, i, stage - 1)] * (stage > 0)
        rows.append(tuple(row))
    return tuple(rows)


def planned(
    ranks: int, virtual: int, microbatches: int, model: str = "Net"
) -> tuple[Plan, Timeline]:
    """A plan of it and its simulated step: a message takes a quarter of a second."""
    schedule, n_stages = looped(ranks, virtual, microbatches), ranks * virtual
    base, _ = hand_made()
    pairs = [(s, s + 1, "forward") for s in range(n_stages - 1)]
    pairs += [(s, s - 1, "backward") for s in range(1, n_stages)]
    stages = tuple(
        replace(
            base.stages[0],
            stage=s,
            rank=s % ranks,
            sends=tuple(Transfer(d, phase, 2**21, ()) for a, d, phase in pairs if a == s),
        )
        for s in range(n_stages)
    )
    seconds = {Kind.F: FORWARD_S, Kind.B: BACKWARD_S}
    compute_s = {(s, kind): took for s in range(n_stages) for kind, took in seconds.items()}
    transfer_s = {(a, d): 0.25 for a, d, _ in pairs}
    held = [[2**30 + 2**20 * i for i in range(len(row))] for row in schedule]
    timeline = simulate(schedule, compute_s, transfer_s, (0.125,) * ranks, held)
    units = n_stages * 2
    decision = replace(
        base.decision,
        unit_nodes=(1,) * units,
        unit_stage=tuple(s for s in range(n_stages) for _ in range(2)),
        unit_recomputes=("nothing", "attention") * n_stages,
        unit_seconds=((0.1, 0.2, 0.1),) * units,
    )
    plan = replace(
        base,
        model=model,
        n_stages=ranks,
        virtual_stages=virtual,
        microbatches=microbatches,
        stages=stages,
        decision=decision,
        schedule=tuple(to_text(schedule).splitlines()),
        step_s=timeline.step_s,
        bubble=timeline.bubble,
    )
    return plan, timeline

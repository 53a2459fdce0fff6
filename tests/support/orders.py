"""Schedules that are drawn: any legal one, and what becomes of it when something is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import strategies as st
from pipecompile.compiler.ir.actions import Action, Kind, Phase, Schedule
from pipecompile.compiler.ir.program import Message


@dataclass(frozen=True)
class Case:
    """What a schedule is for, and its computations.

    Attributes:
        homes: stage -> rank.
        weights: the stages that run W.
    """

    homes: tuple[int, ...]
    messages: tuple[Message, ...]
    microbatches: int
    trains: bool
    weights: frozenset[int]
    computes: Schedule

    @property
    def n_stages(self) -> int:
        return len(self.homes)

    def kinds(self, stage: int) -> list[Kind]:
        kinds = [Kind.F, Kind.B] if self.trains else [Kind.F]
        return [*kinds, Kind.W] if stage in self.weights else kinds


def placed(draw: st.DrawFn, ranks: int = 3, times: int = 2) -> tuple[int, ...]:
    """Looped, in a V, or any."""
    ranks, times = draw(st.integers(1, ranks)), draw(st.integers(1, times))
    there = list(range(ranks))
    v = [r for k in range(times) for r in (there if k % 2 == 0 else there[::-1])]
    return tuple(draw(st.sampled_from([there * times, v, draw(st.permutations(there * times))])))


def routed(draw: st.DrawFn, n_stages: int, trains: bool) -> tuple[Message, ...]:
    """Neighbours always talk; some pairs further apart do too."""
    pairs = {(s, s + 1) for s in range(n_stages - 1)}
    far = [(a, b) for a in range(n_stages) for b in range(a + 2, n_stages)]
    pairs |= set(draw(st.lists(st.sampled_from(far), max_size=2))) if far else set()
    forward = [Message(a, b, Phase.FORWARD, ()) for a, b in sorted(pairs)]
    backward = [Message(b, a, Phase.BACKWARD, ()) for a, b in sorted(pairs)]
    return tuple(forward + backward) if trains else tuple(forward)


@st.composite
def cases(draw: st.DrawFn, microbatches: int = 3, ranks: int = 3, times: int = 2) -> Case:
    """In any order that some run of all ranks could have."""
    homes = placed(draw, ranks, times)
    trains = draw(st.booleans()) or draw(st.booleans())
    split = st.frozensets(st.integers(0, len(homes) - 1))
    case = Case(
        homes,
        routed(draw, len(homes), trains),
        draw(st.integers(1, microbatches)),
        trains,
        draw(split) if trains else frozenset(),
        (),
    )
    return replace(case, computes=_ordered(draw, case))


def _ordered(draw: st.DrawFn, case: Case) -> Schedule:
    rows: list[list[Action]] = [[] for _ in range(max(case.homes) + 1)]
    done: set[tuple[int, Kind, int]] = set()
    following = {(s, kind): 0 for s in range(case.n_stages) for kind in case.kinds(s)}

    def ready(stage: int, kind: Kind) -> bool:
        i, before = following[stage, kind], case.kinds(stage)
        phase = Phase.FORWARD if kind is Kind.F else Phase.BACKWARD
        needs = [(m.src, kind, i) for m in case.messages if (m.dst, m.phase) == (stage, phase)]
        needs = needs if kind is not Kind.W else []
        needs += [(stage, part, i) for part in before[: before.index(kind)]]
        return i < case.microbatches and all(need in done for need in needs)

    while choices := [key for key in following if ready(*key)]:
        stage, kind = draw(st.sampled_from(choices))
        done.add((stage, kind, following[stage, kind]))
        rows[case.homes[stage]].append(Action(stage, kind, following[stage, kind]))
        following[stage, kind] += 1
    return tuple(map(tuple, rows))


@st.composite
def changed(draw: st.DrawFn, schedule: Schedule, case: Case) -> Schedule:
    """One or two actions are left out, repeated, moved, exchanged, or made others."""
    rows = [list(row) for row in schedule]
    for _ in range(draw(st.integers(1, 2))):
        full = [rank for rank, row in enumerate(rows) if row]
        if not full:
            break
        row = rows[draw(st.sampled_from(full))]
        at = draw(st.integers(0, len(row) - 1))
        to = draw(st.integers(0, len(row) - 1))
        match draw(st.sampled_from(["drop", "repeat", "swap", "next", "move", "leave", "alter"])):
            case "drop":
                del row[at]
            case "repeat":
                row.insert(to, row[at])
            case "swap":
                row[at], row[to] = row[to], row[at]
            case "next":
                row[max(at - 1, 0)], row[at] = row[at], row[max(at - 1, 0)]
            case "move":
                row.insert(to, row.pop(at))
            case "leave":
                other = rows[draw(st.integers(0, len(rows) - 1))]
                other.insert(draw(st.integers(0, len(other))), row.pop(at))
            case _:
                row[at] = draw(altered(row[at], case))
    return tuple(map(tuple, rows))


@st.composite
def altered(draw: st.DrawFn, action: Action, case: Case) -> Action:
    """Of another stage, microbatch, kind, or to another peer."""
    talks: Sequence[Kind] = (Kind.SEND_F, Kind.SEND_B, Kind.RECV_F, Kind.RECV_B)
    kinds = talks if action.kind in talks else (Kind.F, Kind.B, Kind.W)
    stages = st.integers(0, case.n_stages)
    match draw(st.sampled_from(["stage", "number", "kind", "peer"])):
        case "stage":
            return replace(action, stage=draw(stages))
        case "number":
            return replace(action, microbatch=draw(st.integers(0, case.microbatches)))
        case "kind":
            return replace(action, kind=draw(st.sampled_from(kinds)))
        case _:
            return replace(action, peer=draw(st.none() | stages))

"""The simulated step: transfers, links, and who waits for whom."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.ir.actions import COMPUTE_OF, Action, Kind, Phase, Schedule, from_text
from pipecompile.compiler.ir.program import Message
from pipecompile.passes.generators.shape import Homes, looped, v_shaped
from pipecompile.passes.schedule.communication import add_communication
from pipecompile.passes.schedule.limits import verify_held, verify_in_flight
from pipecompile.passes.schedule.simulate import Interval, Timeline, Transfer, simulate, waits
from pipecompile.passes.schedule.verify import verify_schedule
from support.matrix import quickly
from support.orders import Case, cases

SECONDS = st.integers(0, 5).map(float)
TWO = from_text("0F0 0SEND_F0→1 0F1 0SEND_F1→1\n1RECV_F0←0 1F0 1RECV_F1←0 1F1")
ONE_EACH = {(s, Kind.F): 1.0 for s in range(2)}


def ends(timeline: Timeline) -> list[list[float]]:
    return [[x.end_s for x in row] for row in timeline.ranks]


def test_messages_take_their_time() -> None:
    timeline = simulate(TWO, ONE_EACH, {(0, 1): 3.0})
    assert ends(timeline) == [[1, 2], [5, 6]]
    assert timeline.transfers == (
        Transfer(0, 1, Kind.F, 0, 1.0, 4.0),
        Transfer(0, 1, Kind.F, 1, 2.0, 5.0),
    )
    assert [timeline.waiting_s(rank) for rank in range(2)] == [0, 4]


def test_a_send_takes_its_senders_time() -> None:
    """Under way from its begin; what comes after it on its rank waits."""
    timeline = simulate(TWO, ONE_EACH, {(0, 1): 3.0}, send_s={(0, 1): 0.5})
    assert ends(timeline) == [[1, 2.5], [5, 6.5]]
    assert [(t.start_s, t.end_s) for t in timeline.transfers] == [(1.0, 4.0), (2.5, 5.5)]
    assert timeline.bubble > simulate(TWO, ONE_EACH, {(0, 1): 3.0}).bubble


def test_a_rendezvous_waits_for_the_receive_and_for_its_link() -> None:
    """The second receive is posted after the first forward of rank 1, at 5."""
    timeline = simulate(TWO, ONE_EACH, {(0, 1): 3.0}, rendezvous=True)
    assert [(t.start_s, t.end_s) for t in timeline.transfers] == [(1, 4), (5, 8)]
    early = from_text("0F0 0SEND_F0→1 0F1 0SEND_F1→1\n1RECV_F0←0 1RECV_F1←0 1F0 1F1")
    timeline = simulate(early, ONE_EACH, {(0, 1): 3.0}, rendezvous=True)
    assert [(t.start_s, t.end_s) for t in timeline.transfers] == [(1, 4), (4, 7)]


def test_waiting_is_owed_to_who_sends_last() -> None:
    """Stage 2 hears of 0 and of 1; rank 0 runs both its stages before."""
    text = "0F0 0SEND_F0→2 3F0\n1F0 1SEND_F0→2\n2RECV_F0←0 2RECV_F0←1 2F0"
    seconds = {(0, Kind.F): 1.0, (1, Kind.F): 4.0, (2, Kind.F): 1.0, (3, Kind.F): 1.0}
    timeline = simulate(from_text(text), seconds, {(0, 2): 0.5})
    assert waits(timeline) == ({}, {}, {1: 4.0})
    timeline = simulate(from_text(text), seconds, {(0, 2): 9.0})
    assert waits(timeline) == ({}, {}, {0: 10.0})


def test_what_no_message_ends_is_owed_to_the_rank_itself() -> None:
    """As measured times may be: a message was there, and the action began later."""
    rows = (
        (Interval(Action(0, Kind.F, 0), 0.0, 1.0),),
        (Interval(Action(1, Kind.F, 0), 1.75, 3.0), Interval(Action(1, Kind.B, 0), 3.5, 4.0)),
    )
    timeline = Timeline(rows, transfers=(Transfer(0, 1, Kind.F, 0, 1.0, 1.5),))
    assert waits(timeline) == ({}, {0: 1.5, 1: 0.25 + 0.5})


@given(st.data(), cases())
def test_simulated_as_by_definition(data: st.DataObject, case: Case) -> None:
    """Every action starts when all are over that it waits for."""
    compute_s = {(s, k): data.draw(SECONDS) for s in range(case.n_stages) for k in case.kinds(s)}
    transfer_s = {(m.src, m.dst): data.draw(SECONDS) for m in case.messages}
    timeline = simulate(add_communication(case.computes, case.messages), compute_s, transfer_s)
    end = {x.action: x.end_s for row in timeline.ranks for x in row}
    assert [[x.action for x in row] for row in timeline.ranks] == list(map(list, case.computes))
    for row in timeline.ranks:
        free = 0.0
        for x in row:
            arrivals = [
                end[Action(m.src, x.action.kind, x.action.microbatch)] + transfer_s[m.src, m.dst]
                for m in case.messages
                if m.dst == x.action.stage
                and COMPUTE_OF[m.phase] is x.action.kind
                and case.homes[m.src] != case.homes[m.dst]
            ]
            assert x.start_s == max([free, *arrivals])
            free = x.end_s
    for rank, owed in enumerate(waits(timeline)):
        assert sum(owed.values()) == timeline.waiting_s(rank)
        assert rank not in owed


# -- a large pipeline -----------------------------------------------------------------------------

LARGE, QUICK = (64, 512), (16, 128)
"""Ranks and microbatches."""


def steady(homes: Homes, parts: str, ranks: int, microbatches: int) -> Schedule:
    """In turn, of what is ready, each rank's deepest backward, else forward, else weight gradient;
    no stage holds more microbatches than two per rank."""
    kinds = [Kind(part) for part in parts]
    last = max(parts, key="FBW".index)
    done = dict.fromkeys(((s, Kind(k)) for s in range(len(homes)) for k in "FBW"), 0)
    mine = [[s for s in range(len(homes)) if homes[s] == r] for r in range(ranks)]
    rows: list[list[Action]] = [[] for _ in mine]
    limit = 2 * ranks + 2

    def ready(stage: int, kind: Kind) -> bool:
        i = done[stage, kind]
        if i == microbatches:
            return False
        if kind is Kind.F:
            fits = i - done[stage, Kind(last)] < limit
            return fits and (stage == 0 or done[stage - 1, kind] > i)
        if kind is Kind.B and stage + 1 < len(homes) and done[stage + 1, kind] <= i:
            return False
        return done[stage, Kind.F if kind is Kind.B else Kind.B] > i

    while any(
        chosen := [
            next(((s, k) for k in kinds for s in reversed(stages) if ready(s, k)), None)
            for stages in mine
        ]
    ):
        for row, key in zip(rows, chosen, strict=True):
            if key is not None:
                row.append(Action(*key, done[key]))
                done[key] += 1
    return tuple(map(tuple, rows))


@pytest.mark.parametrize(("ranks", "microbatches"), quickly([QUICK], [QUICK, LARGE]))
@pytest.mark.parametrize(("place", "parts"), [(looped, "BF"), (v_shaped, "BFW")])
def test_a_large_schedule_is_verified_in_seconds(
    place: Callable[[int, int], Homes], parts: str, ranks: int, microbatches: int
) -> None:
    """Of the processor's, with its generation; 20 are promised."""
    start = time.process_time()
    homes = place(ranks, 2)
    n = len(homes)
    messages = [Message(s, s + 1, Phase.FORWARD, ()) for s in range(n - 1)]
    messages += [Message(s + 1, s, Phase.BACKWARD, ()) for s in range(n - 1)]
    schedule = add_communication(steady(homes, parts, ranks, microbatches), messages)
    weights = range(n) if "W" in parts else ()
    verify_schedule(schedule, messages, microbatches, trains=True, weights=weights)
    verify_in_flight(schedule, [2 * ranks + 2] * n)
    verify_held(schedule, [1.0] * n, [0.5] * n, [4.0 * ranks + 4] * ranks)
    timeline = simulate(schedule, {(s, k): 1.0 for s in range(n) for k in Kind}, {})
    assert timeline.bubble < 0.2
    assert time.process_time() - start < 20

"""Receives are posted in time, in the order of the sends, and not without need."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.ir.actions import RECV, SEND, Action, Kind, Phase, Schedule, from_text
from pipecompile.compiler.ir.program import Message
from pipecompile.passes.schedule.communication import add_communication
from pipecompile.passes.schedule.simulate import simulate
from support.orders import Case, cases

SECONDS = st.integers(0, 5).map(float)


def early(schedule: Schedule) -> Schedule:
    """All receives at the start: no message waits for one."""
    return tuple(
        (
            *(a for a in row if a.kind in RECV.values()),
            *(a for a in row if a.kind not in RECV.values()),
        )
        for row in schedule
    )


@given(st.data(), cases(microbatches=4))
def test_no_message_that_is_ready_waits_for_its_receive(data: st.DataObject, case: Case) -> None:
    compute_s = {(s, k): data.draw(SECONDS) for s in range(case.n_stages) for k in case.kinds(s)}
    transfer_s = {(m.src, m.dst): data.draw(SECONDS) for m in case.messages}
    schedule = add_communication(case.computes, case.messages, compute_s, transfer_s)
    ours = simulate(schedule, compute_s, transfer_s, rendezvous=True)
    ideal = simulate(early(schedule), compute_s, transfer_s, rendezvous=True)
    assert ours.ranks == ideal.ranks


@given(st.data(), cases(microbatches=4))
def test_what_is_posted_early_is_posted_for_a_reason(data: st.DataObject, case: Case) -> None:
    """Posted one computation later, a receive would be beside too little computation, or behind
    the one that follows it on its link."""
    compute_s = {(s, k): data.draw(SECONDS) for s in range(case.n_stages) for k in case.kinds(s)}
    transfer_s = {(m.src, m.dst): data.draw(SECONDS) for m in case.messages}
    schedule = add_communication(case.computes, case.messages, compute_s, transfer_s)
    for row in schedule:
        for at, action in enumerate(row):
            if action.kind in RECV.values():
                assert _needed(row, at, compute_s, transfer_s, dict(enumerate(case.homes)))


def _needed(
    row: tuple[Action, ...],
    at: int,
    compute_s: dict[tuple[int, Kind], float],
    transfer_s: dict[tuple[int, int], float],
    homes: dict[int, int],
) -> bool:
    """Whether the transfers of its link, from this one up to one that is read, would be late if
    they began a computation later; or would follow one another in another order."""
    spent_s = 0.0
    after = next(i for i in range(at, len(row)) if row[i].kind.computes) + 1
    sender = homes[row[at].peer or 0]
    for action in row[at:]:
        if action.kind not in RECV.values() or homes[action.peer or 0] != sender:
            continue
        assert action.peer is not None
        spent_s += transfer_s[action.peer, action.stage]
        kind = Kind.F if action.kind is Kind.RECV_F else Kind.B
        read = row.index(Action(action.stage, kind, action.microbatch))
        beside = [a for a in row[after:read] if a.kind.computes]
        if read < after or not beside or sum(compute_s[a.stage, a.kind] for a in beside) < spent_s:
            return True
    return False


def test_a_receive_is_posted_one_computation_ahead() -> None:
    messages = [Message(0, 1, Phase.FORWARD, ())]
    computes = from_text("0F0 0F1 0F2\n1F0 1F1 1F2")
    assert add_communication(computes, messages) == from_text(
        "0F0 0SEND_F0→1 0F1 0SEND_F1→1 0F2 0SEND_F2→1\n1RECV_F0←0 1RECV_F1←0 1F0 1RECV_F2←0 1F1 1F2"
    )


def test_a_receive_is_posted_earlier_where_transfers_take_longer() -> None:
    messages = [Message(0, 1, Phase.FORWARD, ())]
    computes = from_text("0F0 0F1 0F2 0F3\n1F0 1F1 1F2 1F3")
    seconds = {(s, Kind.F): 1.0 for s in range(2)}
    row = add_communication(computes, messages, seconds, {(0, 1): 1.5})[1]
    assert (row,) == from_text("1RECV_F0←0 1RECV_F1←0 1RECV_F2←0 1F0 1RECV_F3←0 1F1 1F2 1F3")
    row = add_communication(computes, messages, seconds, {(0, 1): 0.5})[1]
    assert (row,) == from_text("1RECV_F0←0 1RECV_F1←0 1F0 1RECV_F2←0 1F1 1RECV_F3←0 1F2 1F3")


@given(cases(microbatches=4))
def test_links_carry_in_one_order(case: Case) -> None:
    schedule = add_communication(case.computes, case.messages)
    for src in range(len(schedule)):
        for dst in range(len(schedule)):
            sent = [
                (a.stage, a.peer, a.kind.phase, a.microbatch)
                for a in schedule[src]
                if a.kind in SEND.values() and case.homes[a.peer or 0] == dst
            ]
            received = [
                (a.peer, a.stage, a.kind.phase, a.microbatch)
                for a in schedule[dst]
                if a.kind in RECV.values() and case.homes[a.peer or 0] == src
            ]
            assert sent == received


@pytest.mark.parametrize("reverse", [False, True])
def test_sends_follow_in_the_order_in_which_values_are_dropped(reverse: bool) -> None:
    messages = [Message(0, s, Phase.FORWARD, ()) for s in (1, 2)]
    case = from_text("0F0\n1F0\n2F0")
    found = add_communication(case, messages[::-1] if reverse else messages)
    assert found[0] == from_text("0F0 0SEND_F0→1 0SEND_F0→2")[0]
    assert replace(found[0][1], peer=2) == found[0][2]

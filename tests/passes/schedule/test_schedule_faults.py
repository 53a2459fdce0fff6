"""The verifier against a slow judge that carries schedules out: no miss, and no false alarm."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.ir.actions import Action, Kind, Phase, Schedule, from_text
from pipecompile.compiler.ir.errors import VerificationError
from pipecompile.compiler.ir.program import Message
from pipecompile.passes.schedule.communication import add_communication
from pipecompile.passes.schedule.fault import LINES, WIDTH
from pipecompile.passes.schedule.limits import peaks_held, verify_held
from pipecompile.passes.schedule.registry import SCHEDULES
from pipecompile.passes.schedule.verify import verify_compute, verify_schedule
from support.interpreted import is_legal
from support.matrix import quickly
from support.orders import Case, cases, changed


def refusal(schedule: Schedule, case: Case) -> str:
    """What the verifier says; "" for nothing."""
    try:
        verify_schedule(schedule, case.messages, case.microbatches, case.trains, case.weights)
    except VerificationError as error:
        return str(error)
    return ""


def judged(schedule: Schedule, case: Case) -> bool:
    return is_legal(
        schedule, case.n_stages, case.messages, case.microbatches, case.trains, case.weights
    )


@given(cases())
def test_what_ranks_can_run_is_legal(case: Case) -> None:
    schedule = add_communication(case.computes, case.messages)
    assert judged(schedule, case)
    assert refusal(schedule, case) == ""
    verify_compute(case.computes, case.messages, case.microbatches, case.trains, case.weights)


@settings(max_examples=400)
@given(st.data(), cases())
def test_changed_actions_are_refused_or_do_no_harm(data: st.DataObject, case: Case) -> None:
    schedule = add_communication(case.computes, case.messages)
    agree(data.draw(changed(schedule, case)), case)


@settings(max_examples=200)
@given(st.data(), cases())
def test_changed_computations_are_refused_or_do_no_harm(data: st.DataObject, case: Case) -> None:
    """Before they are given sends and receives; where that can be done."""
    computes = data.draw(changed(case.computes, case))
    try:
        verify_compute(computes, case.messages, case.microbatches, case.trains, case.weights)
    except VerificationError as error:
        check_drawing(str(error))
        return
    agree(add_communication(computes, case.messages), case)


def agree(schedule: Schedule, case: Case) -> None:
    said = refusal(schedule, case)
    assert judged(schedule, case) == (said == ""), said
    if said:
        check_drawing(said)


def check_drawing(said: str) -> None:
    sentence, _, grid = said.partition("\n\n")
    assert "\n" not in sentence
    assert max(map(len, grid.splitlines())) <= WIDTH
    assert grid.startswith("time")


@pytest.mark.parametrize("name", quickly(set(SCHEDULES) - {"v_min", "v_half"}, SCHEDULES))
@settings(max_examples=15)
@given(data=st.data(), microbatches=st.integers(1, 4))
def test_changed_schedules_of_ours(name: str, data: st.DataObject, microbatches: int) -> None:
    check_changed(name, data, microbatches)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
@given(data=st.data(), microbatches=st.integers(1, 4))
def test_many_changed_schedules_of_ours(name: str, data: st.DataObject, microbatches: int) -> None:
    check_changed(name, data, microbatches)


def check_changed(name: str, data: st.DataObject, microbatches: int) -> None:
    kind = SCHEDULES[name]
    shape = kind.shape(3, microbatches)
    n = shape.n_stages
    messages = [Message(s, s + 1, Phase.FORWARD, ()) for s in range(n - 1)]
    messages += [Message(s + 1, s, Phase.BACKWARD, ()) for s in range(n - 1)]
    computes = kind.generate(shape)
    weights = frozenset(a.stage for row in computes for a in row if a.kind is Kind.W)
    case = Case(shape.homes, tuple(messages), microbatches, True, weights, computes)
    schedule = add_communication(computes, messages)
    assert refusal(schedule, case) == ""
    assert judged(schedule, case)
    agree(data.draw(changed(schedule, case)), case)


# -- what is said ---------------------------------------------------------------------------------


def pipe(n_stages: int) -> list[Message]:
    messages = [Message(s, s + 1, Phase.FORWARD, ()) for s in range(n_stages - 1)]
    return messages + [Message(s + 1, s, Phase.BACKWARD, ()) for s in range(n_stages - 1)]


def said_of(schedule: Schedule, n_stages: int, microbatches: int) -> str:
    with pytest.raises(VerificationError) as caught:
        verify_schedule(schedule, pipe(n_stages), microbatches, trains=True)
    return str(caught.value)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    kind = SCHEDULES["1f1b"]
    return kind.generate(kind.shape(ranks, microbatches))


def swapped(schedule: Schedule, rank: int, old: str, new: str) -> Schedule:
    """With two actions of a rank exchanged."""
    row = list(schedule[rank])
    one, other = row.index(Action.parse(old)), row.index(Action.parse(new))
    row[one], row[other] = row[other], row[one]
    return (*schedule[:rank], tuple(row), *schedule[rank + 1 :])


def test_the_fault_is_drawn() -> None:
    schedule = add_communication(one_f_one_b(3, 4), pipe(3))
    assert said_of(swapped(schedule, 2, "2F2", "2B2"), 3, 4) == BACKWARD_FIRST
    assert said_of(swapped(schedule, 0, "0SEND_F1→1", "0SEND_F2→1"), 3, 4) == OUT_OF_ORDER


BACKWARD_FIRST = """\
2B2 comes before 2F2

time        0    1    2    3    4    5      6    7    8    9   10   11
rank 0    0F0  0F1  0F2            0B0    0F3  0B1       0B2       0B3
rank 1         1F0  1F1       1B0  1F2    1B1  1F3  1B2       1B3
rank 2              2F0  2B0  2F1  2B1  »2B2«  2F2  2F3  2B3"""
OUT_OF_ORDER = """\
0→1 forward: sent in order [0, 2, 1, 3], received [0, 1, 2, 3]

time                 0                 1    2    3    4    5    6    7    8    9   10   11
rank 0             0F0  0F1 »0SEND_F2→1«  0F2            0B0  0F3  0B1       0B2       0B3
rank 1    »1RECV_F1←0«               1F0  1F1       1B0  1F2  1B1  1F3  1B2       1B3
rank 2                                    2F0  2B0  2F1  2B1  2F2  2B2  2F3  2B3"""


def test_a_wait_cycle_is_drawn_with_all_who_wait() -> None:
    first, second, third = one_f_one_b(3, 4)
    greedy = tuple(sorted(second, key=lambda action: action.kind is Kind.B))
    schedule = add_communication((first, greedy, third), pipe(3))
    assert said_of(schedule, 3, 4) == CYCLE


CYCLE = """\
a wait cycle: 0B0 waits for rank 1, 1F3 waits for rank 0

time        0    1    2    3    4    5    6    7      8  9
rank 0    0F0  0F1  0F2                           »0B0«  …
rank 1         1F0  1F1  1F2                      »1F3«  …
rank 2              2F0  2B0  2F1  2B1  2F2  2B2    2F3  …"""


def test_two_ranks_agree_on_the_order_of_all_that_one_sends_the_other() -> None:
    """Stages 0 and 2 are on rank 0, 1 and 3 on rank 1: what goes to 3 overtakes what goes to 1."""
    messages = [Message(a, b, Phase.FORWARD, ()) for a, b in ((0, 1), (1, 2), (2, 3), (0, 3))]
    text = (
        "0F0 0SEND_F0→1 0SEND_F0→3 2RECV_F0←1 2F0 2SEND_F0→3\n"
        "1RECV_F0←0 1F0 1SEND_F0→2 3RECV_F0←0 3RECV_F0←2 3F0"
    )
    verify_schedule(from_text(text), messages, 1, trains=False)
    late = text.replace("3RECV_F0←0 3RECV_F0←2", "3RECV_F0←2 3RECV_F0←0")
    with pytest.raises(VerificationError, match="3RECV_F0←2 is posted where 0SEND_F0→3 is next"):
        verify_schedule(from_text(late), messages, 1, trains=False)


def test_a_long_schedule_is_drawn_around_the_fault() -> None:
    schedule = add_communication(one_f_one_b(64, 512), pipe(64))
    said = said_of(swapped(schedule, 40, "40SEND_F300→41", "40SEND_F301→41"), 64, 512)
    assert said.startswith("40→41 forward: sent in order […, 298, 299, 301, 300, 302, …], received")
    check_drawing(said)
    lines = said.splitlines()
    assert len(lines) == 3 + LINES + 2
    assert next(line.split()[1] for line in lines if line.startswith("rank")) == "33"
    assert said.count("»") == said.count("«") == 2


def test_bytes_of_a_rank_are_bounded() -> None:
    """Stages 0 and 1 on one rank; stage 1 carries on to its W, stage 0 has none."""
    schedule = from_text("0F0 1F0 1B0 0B0 0F1 1F1 1B1 0B1 1W0 1W1")
    stash, carry = [3, 5], [100, 2]
    assert peaks_held(schedule, stash, carry) == (3 + 5 + 2,)
    verify_held(schedule, stash, carry, [10])
    with pytest.raises(VerificationError, match=r"after 1F1 rank 0 holds 10 bytes .*planned 9"):
        verify_held(schedule, stash, carry, [9])

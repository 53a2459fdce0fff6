"""Schedules: every generated one is legal, prints and parses; illegal ones are caught."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.ir.actions import (
    Action,
    Kind,
    Schedule,
    from_text,
    homes_of,
    max_in_flight,
    to_text,
)
from pipecompile.compiler.ir.errors import VerificationError
from pipecompile.compiler.ir.graph import Phase
from pipecompile.compiler.ir.program import Message
from pipecompile.passes.schedule.communication import add_communication
from pipecompile.passes.schedule.forward_only import forward_only
from pipecompile.passes.schedule.limits import verify_in_flight
from pipecompile.passes.schedule.registry import SCHEDULES
from pipecompile.passes.schedule.simulate import simulate
from pipecompile.passes.schedule.verify import verify_schedule

GOLDEN_1F1B = """\
0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3
1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3
2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3"""


def made(
    name: str, n_stages: int, microbatches: int, splits: Sequence[bool] | None = None
) -> Schedule:
    """The compute actions, with one stage per rank."""
    kind = SCHEDULES[name]
    return kind.generate(kind.shape(n_stages, microbatches, splits=splits))


@st.composite
def routes(draw: st.DrawFn, n_stages: int) -> list[Message]:
    """Neighbours always talk; some pairs further apart do too."""
    pairs = {(s, s + 1) for s in range(n_stages - 1)}
    far = [(a, b) for a in range(n_stages) for b in range(a + 2, n_stages)]
    pairs |= set(draw(st.lists(st.sampled_from(far), max_size=3))) if far else set()
    forward = [Message(a, b, Phase.FORWARD, ()) for a, b in sorted(pairs)]
    backward = [Message(b, a, Phase.BACKWARD, ()) for a, b in sorted(pairs)]
    return forward + backward


@given(st.data(), st.integers(1, 8), st.integers(1, 20))
def test_1f1b_with_communication_is_legal(
    data: st.DataObject, n_stages: int, microbatches: int
) -> None:
    messages = data.draw(routes(n_stages))
    schedule = add_communication(made("1f1b", n_stages, microbatches), messages)
    verify_schedule(schedule, messages, microbatches, trains=True)
    verify_in_flight(schedule, [min(n_stages - s, microbatches) for s in range(n_stages)])
    assert from_text(to_text(schedule)) == schedule


@given(st.data(), st.integers(1, 8), st.integers(1, 20))
def test_zb_h1_with_communication_is_legal(
    data: st.DataObject, n_stages: int, microbatches: int
) -> None:
    messages = data.draw(routes(n_stages))
    splits = [data.draw(st.booleans()) for _ in range(n_stages)]
    schedule = add_communication(made("zb_h1", n_stages, microbatches, splits), messages)
    verify_schedule(schedule, messages, microbatches, trains=True)
    verify_in_flight(schedule, [min(n_stages, microbatches)] * n_stages)
    assert from_text(to_text(schedule)) == schedule
    for split, actions in zip(splits, schedule, strict=True):
        assert any(action.kind is Kind.W for action in actions) == split


@given(st.integers(2, 6), st.integers(6, 20))
def test_zb_h1_is_faster_than_1f1b(s: int, m: int) -> None:
    messages = [Message(a, a + 1, Phase.FORWARD, ()) for a in range(s - 1)]
    messages += [Message(a + 1, a, Phase.BACKWARD, ()) for a in range(s - 1)]
    splits = [stage > 0 for stage in range(s)]
    seconds = {(a, Kind.F): 1.0 for a in range(s)}
    whole = seconds | {(a, Kind.B): 2.0 for a in range(s)}
    parts = whole | {(a, k): 1.0 for a in range(1, s) for k in (Kind.B, Kind.W)}
    plain = simulate(add_communication(made("1f1b", s, m), messages), whole, {})
    split = simulate(add_communication(made("zb_h1", s, m, splits), messages), parts, {})
    assert split.makespan_s < plain.makespan_s


@given(st.data(), st.integers(1, 8), st.integers(1, 20))
def test_forward_only_is_legal(data: st.DataObject, n_stages: int, microbatches: int) -> None:
    messages = [m for m in data.draw(routes(n_stages)) if m.phase is Phase.FORWARD]
    schedule = add_communication(
        forward_only(SCHEDULES["1f1b"].shape(n_stages, microbatches)), messages
    )
    verify_schedule(schedule, messages, microbatches, trains=False)


@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 5), st.integers(1, 5))
def test_1f1b_takes_the_time_of_the_formula(s: int, m: int, forward: int, backward: int) -> None:
    """(m + S − 1)(f + b) for equal stages and free transfers (Narayanan et al., 2021)."""
    messages = [Message(a, a + 1, Phase.FORWARD, ()) for a in range(s - 1)]
    messages += [Message(a + 1, a, Phase.BACKWARD, ()) for a in range(s - 1)]
    seconds = {(a, Kind.F): float(forward) for a in range(s)}
    seconds |= {(a, Kind.B): float(backward) for a in range(s)}
    timeline = simulate(add_communication(made("1f1b", s, m), messages), seconds, {})
    assert timeline.makespan_s == (m + s - 1) * (forward + backward)
    assert timeline.bubble == pytest.approx((s - 1) / (m + s - 1))


def test_weight_gradients_come_after_their_backward() -> None:
    text = "0F0 0W0 0B0"
    with pytest.raises(VerificationError, match="0W0 comes before 0B0"):
        verify_schedule(from_text(text), [], 1, trains=True)
    with pytest.raises(VerificationError, match="runs W of microbatches"):
        verify_schedule(from_text("0F0 0B0 0W0 0F1 0B1"), [], 2, trains=True)


def test_1f1b_is_the_published_one() -> None:
    assert to_text(made("1f1b", 3, 4)) == GOLDEN_1F1B
    found = [max_in_flight(actions, s) for s, actions in enumerate(made("1f1b", 3, 4))]
    assert found == [3, 2, 1]


@pytest.mark.parametrize(
    "text", ["2F0", "1W4", "1SEND_B3→0", "0RECV_B3←1", "2REDUCE_GRAD", "0SYNC_TIED"]
)
def test_actions_print_and_parse(text: str) -> None:
    assert str(Action.parse(text)) == text


@pytest.mark.parametrize("text", ["F0", "2X0", "1SEND_B3←0", "0RECV_F1→2", "", "2F0 "[:1]])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an action"):
        Action.parse(text)


TWO = [Message(0, 1, Phase.FORWARD, ()), Message(1, 0, Phase.BACKWARD, ())]
GOOD = (
    "0F0 0SEND_F0→1 0F1 0SEND_F1→1 0RECV_B0←1 0B0 0RECV_B1←1 0B1\n"
    "1RECV_F0←0 1RECV_F1←0 1F0 1B0 1SEND_B0→0 1F1 1B1 1SEND_B1→0"
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0F1 0SEND_F1→1", "0SEND_F1→1 0F1", "wrong side"),
        ("0B1", "0B0", "runs B of microbatches"),
        ("1RECV_F0←0 1RECV_F1←0", "1RECV_F1←0 1RECV_F0←0", "sent in order"),
        ("1SEND_B1→0", "", "microbatches .0. are sent"),
        ("1F1 1B1", "1B1 1F1", "comes before"),
        ("0RECV_B1←1 0B1", "0B1 0RECV_B1←1", "wrong side"),
        ("0F1", "0F1 0SEND_B0→1", "has no message"),
    ],
)
def test_illegal_schedules_are_caught(old: str, new: str, message: str) -> None:
    verify_schedule(from_text(GOOD), TWO, 2, trains=True)
    with pytest.raises(VerificationError, match=message):
        verify_schedule(from_text(GOOD.replace(old, new)), TWO, 2, trains=True)


def test_a_wait_cycle_is_caught() -> None:
    both = [Message(0, 1, Phase.FORWARD, ()), Message(1, 0, Phase.FORWARD, ())]
    text = "0RECV_F0←1 0F0 0SEND_F0→1\n1RECV_F0←0 1F0 1SEND_F0→0"
    with pytest.raises(VerificationError, match="wait cycle"):
        verify_schedule(from_text(text), both, 1, trains=False)


def test_too_many_microbatches_in_flight_are_caught() -> None:
    with pytest.raises(VerificationError, match="holds 3 microbatches, planned 2"):
        verify_in_flight(from_text("0F0 0F1 0F2 0B0 0B1 0B2"), [2])


# -- several stages per rank --------------------------------------------------------------------


def interleaved(homes: list[int], microbatches: int) -> Schedule:
    """Backwards first, and what is ready: a legal order for any stages on any ranks."""
    last = len(homes) - 1
    rows: list[list[Action]] = [[] for _ in range(max(homes) + 1)]
    waiting = [
        Action(s, kind, i)
        for kind in (Kind.B, Kind.F)
        for i in range(microbatches)
        for s in range(last + 1)
    ]
    done: set[tuple[int, Kind, int | None]] = set()

    def ready(a: Action) -> bool:
        needs = [(a.stage - 1, Kind.F)] if a.kind is Kind.F else [(a.stage, Kind.F)]
        needs += [(a.stage + 1, Kind.B)] if a.kind is Kind.B else []
        earlier = a.microbatch == 0 or (a.stage, a.kind, (a.microbatch or 0) - 1) in done
        return earlier and all((s, k, a.microbatch) in done for s, k in needs if 0 <= s <= last)

    while waiting:
        taken = next(action for action in waiting if ready(action))
        waiting.remove(taken)
        done.add((taken.stage, taken.kind, taken.microbatch))
        rows[homes[taken.stage]].append(taken)
    return tuple(map(tuple, rows))


@st.composite
def placements(draw: st.DrawFn) -> list[int]:
    """Looped, in a V, or any."""
    ranks, times = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    looped = [*range(ranks)] * times
    back = [r for k in range(times) for r in (range(ranks) if k % 2 == 0 else range(ranks)[::-1])]
    return draw(st.sampled_from([looped, back, draw(st.permutations(looped))]))


@given(st.data(), placements(), st.integers(1, 6))
def test_stages_of_one_rank_need_no_messages(
    data: st.DataObject, homes: list[int], microbatches: int
) -> None:
    messages = data.draw(routes(len(homes)))
    schedule = add_communication(interleaved(homes, microbatches), messages)
    verify_schedule(schedule, messages, microbatches, trains=True)
    assert homes_of(schedule) == dict(enumerate(homes))
    ends = [(a.stage, a.peer) for row in schedule for a in row if a.peer is not None]
    assert all(homes[here] != homes[there] for here, there in ends)
    crossing = [m for m in messages if homes[m.src] != homes[m.dst]]
    assert len(ends) == 2 * microbatches * len(crossing)
    assert from_text(to_text(schedule)) == schedule
    seconds = {(s, k): 1.0 for s in range(len(homes)) for k in (Kind.F, Kind.B)}
    timeline = simulate(schedule, seconds, {(m.src, m.dst): 0.5 for m in messages})
    assert [timeline.busy_s(r) for r in range(len(schedule))] == [
        2.0 * microbatches * homes.count(r) for r in range(len(schedule))
    ]


def test_a_stage_on_two_ranks_is_refused() -> None:
    with pytest.raises(VerificationError, match="0F0 is in the list of rank 0, and stage 0 is on"):
        verify_schedule(from_text("0F0 0B0 0F1\n0B1"), [], 2, trains=True)


def test_a_stage_that_is_missing_is_refused() -> None:
    with pytest.raises(VerificationError, match=r"only stages \[0, 2\] have actions"):
        verify_schedule(from_text("0F0 0B0\n2F0 2B0"), [], 1, trains=True)


def test_a_value_is_made_before_it_is_handed_over() -> None:
    messages = [Message(0, 1, Phase.FORWARD, ())]
    verify_schedule(from_text("0F0 1F0 1B0 0B0"), messages, 1, trains=True)
    with pytest.raises(VerificationError, match="1F0 reads what 0F0 makes after it"):
        verify_schedule(from_text("1F0 0F0 1B0 0B0"), messages, 1, trains=True)

"""Schedules of every kind are legal, for any shape, and as published where that is known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.ir.actions import Kind, from_text, to_text
from pipecompile.passes.generators.gpipe import gpipe
from pipecompile.passes.generators.interleaved import interleaved
from pipecompile.passes.generators.one_f_one_b import one_f_one_b
from pipecompile.passes.generators.zb_h1 import zb_h2
from pipecompile.passes.schedule.communication import add_communication
from pipecompile.passes.schedule.registry import SCHEDULES, ScheduleKind
from pipecompile.passes.schedule.verify import verify_schedule
from support.matrix import quickly
from support.shapes import alike, peaks, routes, timeline, unequal

ALL = (*SCHEDULES.values(), ScheduleKind("zb_h2", "", zb_h2, splits_backward=True))


def test_the_kinds_stand_in_the_order_of_the_menu() -> None:
    menu = ["gpipe", "1f1b", "interleaved", "zb_h1", "zb", "zb_v", "v_half", "v_min"]
    assert list(SCHEDULES) == menu


@pytest.mark.parametrize(
    "kind", quickly([k for k in ALL if k.name != "v_half"], ALL), ids=lambda kind: kind.name
)
@settings(max_examples=5)
@given(data=st.data(), ranks=st.integers(1, 5), microbatches=st.integers(1, 11))
def test_a_generated_schedule_is_legal(
    kind: ScheduleKind, data: st.DataObject, ranks: int, microbatches: int
) -> None:
    check_legal(kind, data, ranks, microbatches)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
@settings(max_examples=50)
@given(data=st.data(), ranks=st.integers(1, 5), microbatches=st.integers(1, 11))
def test_many_generated_schedules_are_legal(
    kind: ScheduleKind, data: st.DataObject, ranks: int, microbatches: int
) -> None:
    check_legal(kind, data, ranks, microbatches)


def check_legal(kind: ScheduleKind, data: st.DataObject, ranks: int, microbatches: int) -> None:
    virtual = data.draw(st.sampled_from(kind.virtual or (1, 2, 3)))
    homes = kind.place(ranks, virtual)
    splits = data.draw(st.lists(st.booleans(), min_size=len(homes), max_size=len(homes)))
    known = kind.searches and data.draw(st.booleans())
    costs = data.draw(unequal(homes)) if known else None
    shape = kind.shape(ranks, microbatches, virtual, splits, costs)
    messages = data.draw(routes(len(homes)))
    made = kind.generate(shape)
    assert all(action.kind.computes for actions in made for action in actions)
    schedule = add_communication(made, messages)
    verify_schedule(schedule, messages, microbatches, trains=True)
    assert from_text(to_text(schedule)) == schedule
    weights = {a.stage for actions in made for a in actions if a.kind is Kind.W}
    assert weights == {s for s, split in enumerate(splits) if split}
    if costs is not None:
        assert all(a <= b for a, b in zip(peaks(made, shape), costs.limit_bytes, strict=True))


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_the_same_shape_gets_the_same_schedule(kind: ScheduleKind) -> None:
    shape = alike(kind, 3, 7)
    assert kind.generate(shape) == kind.generate(shape)


@pytest.mark.parametrize("ranks", range(1, 7))
def test_interleaved_never_waits_for_itself(ranks: int) -> None:
    for virtual in range(1, 5):
        for microbatches in range(1, 31):
            shape = SCHEDULES["interleaved"].shape(ranks, microbatches, virtual)
            schedule = interleaved(shape)
            span = timeline(schedule, shape).makespan_s  # raises where it comes to a halt
            work = 3 * virtual * microbatches
            assert work <= span <= work + 3 * virtual * (ranks - 1) + 3 * virtual * ranks


@pytest.mark.parametrize(("ranks", "virtual"), [(2, 2), (4, 2), (4, 3), (8, 2)])
def test_interleaving_divides_the_bubble(ranks: int, virtual: int) -> None:
    """m v + p − 1 times F and B of a stage (Narayanan et al., 2021), where p divides m."""
    shape = SCHEDULES["interleaved"].shape(ranks, 3 * ranks, virtual)
    span = timeline(interleaved(shape), shape).makespan_s
    assert span == 3 * (3 * ranks * virtual + ranks - 1)


def test_interleaved_is_megatrons_where_ranks_divide_microbatches() -> None:
    assert to_text(interleaved(SCHEDULES["interleaved"].shape(2, 4, 2))) == (
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3\n"
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3"
    )


@given(st.integers(1, 8), st.integers(1, 20))
def test_interleaved_with_one_stage_per_rank_is_1f1b(ranks: int, microbatches: int) -> None:
    shape = SCHEDULES["1f1b"].shape(ranks, microbatches)
    assert interleaved(shape) == one_f_one_b(shape)


def test_gpipe_is_breadth_first() -> None:
    assert to_text(gpipe(SCHEDULES["gpipe"].shape(2, 2, 2))) == (
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1\n1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1"
    )


@given(st.integers(1, 6), st.integers(1, 3), st.integers(6, 20))
def test_gpipe_takes_the_time_of_the_formula(ranks: int, virtual: int, m: int) -> None:
    """F, and B, of all stages of a rank, and the way through the ranks (m ≥ p)."""
    shape = SCHEDULES["gpipe"].shape(ranks, m, virtual)
    assert timeline(gpipe(shape), shape).makespan_s == 3 * (m * virtual + ranks - 1)


def test_zb_h2_is_the_published_one() -> None:
    assert to_text(zb_h2(SCHEDULES["zb_h1"].shape(3, 4))) == (
        "0F0 0F1 0F2 0F3 0B0 0W0 0B1 0W1 0B2 0W2 0B3 0W3\n"
        "1F0 1F1 1F2 1B0 1F3 1B1 1B2 1W0 1B3 1W1 1W2 1W3\n"
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3 2W0 2W1 2W2 2W3"
    )


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 4), st.integers(1, 9))
@settings(max_examples=40)
def test_weight_gradients_follow_where_a_program_has_them(name: str, p: int, m: int) -> None:
    """Kinds that do not split run W straight after B, should there be any."""
    kind = SCHEDULES[name]
    n = len(kind.place(p, kind.usual_virtual))
    if kind.splits_backward:
        return
    for actions in kind.generate(kind.shape(p, m, splits=[True] * n)):
        kinds = [action.kind for action in actions]
        assert all(kinds[i + 1] is Kind.W for i, k in enumerate(kinds) if k is Kind.B)

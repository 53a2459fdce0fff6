"""A sketch simulates few microbatches, in an order that little was looked at for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.ir.actions import Kind
from pipecompile.compiler.search.sketch import load_for, shortened
from pipecompile.passes.generators.sequenced import effort_of
from pipecompile.passes.generators.shape import PipelineShape, StageCosts
from pipecompile.passes.schedule.load import _undominated, timed
from pipecompile.passes.schedule.registry import SCHEDULES, ScheduleKind
from support.matrix import quickly

PLAIN = [kind for kind in SCHEDULES.values() if not kind.searches]
SEARCHED = [kind for kind in SCHEDULES.values() if kind.searches]
QUICK = quickly([kind for kind in SEARCHED if kind.name not in ("zb", "v_half")], SEARCHED)


def shapes(kind: ScheduleKind, ranks: int, m: int) -> list[PipelineShape]:
    return [kind.shape(ranks, m, virtual) for virtual in kind.virtual or (1, 2, 3)]


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
def test_few_microbatches_ask_as_much_of_ranks_as_all(kind: ScheduleKind) -> None:
    for ranks, m in itertools.product((1, 2, 3, 4), (1, 4, 7, 16, 18, 35, 48)):
        for shape in shapes(kind, ranks, m):
            few, whole = load_for(kind, shape), kind.load(shape)
            assert few.in_flight == whole.in_flight, shape
            assert few.together == whole.together, shape
            assert few.idle == pytest.approx(whole.idle), shape


@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.name)
def test_an_order_that_is_not_run_waits_about_as_long(kind: ScheduleKind) -> None:
    """Within one part in fifty of the step."""
    for shape in shapes(kind, 4, 24):
        few, whole = load_for(kind, replace(shape, rough=True)), kind.load(shape)
        assert max(few.in_flight) <= max(whole.in_flight) * 1.25 + 1
        assert abs(few.idle - whole.idle) * (shape.ranks - 1) <= 0.02 * shape.microbatches


@pytest.mark.parametrize("kind", SCHEDULES.values(), ids=lambda kind: kind.name)
def test_others_repeat_what_few_microbatches_do(kind: ScheduleKind) -> None:
    """A step that goes on as the busiest rank does is that of all microbatches."""
    for shape in shapes(kind, 3, 42):
        few = shortened(kind, replace(shape, rough=True))
        assert few.microbatches == (12 if not kind.searches else 12 * shape.virtual) < 42
        seconds = {Kind.F: 1.0, Kind.B: 1.1, Kind.W: 0.9 if kind.splits_backward else 0.0}
        compute_s = {(s, k): each for s in range(shape.n_stages) for k, each in seconds.items()}
        part, whole = (timed(kind.order(x), x, compute_s, {}) for x in (few, shape))
        busy = max(part.busy_s(rank) for rank in range(few.ranks))
        expected = part.step_s + (shape.microbatches / few.microbatches - 1) * busy
        assert expected == pytest.approx(whole.step_s, rel=0.02)


@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.name)
def test_less_is_looked_at_for_what_is_not_run(kind: ScheduleKind) -> None:
    """It is complete and in order all the same, with costs and without."""
    for shape in shapes(kind, 3, 6):
        n = shape.n_stages
        ones = (1.0,) * n
        costs = StageCosts(ones, ones, ones, ones, ones, limit_bytes=(6.0,) * 3)
        for known in (shape, replace(shape, costs=costs)):
            rough = replace(known, rough=True)
            assert effort_of(rough) < effort_of(known) / 2
            order = kind.generate(rough)
            assert sorted(map(repr, itertools.chain(*order))) == sorted(
                map(repr, itertools.chain(*kind.generate(known)))
            )


counts = st.integers(1, 3).flatmap(
    lambda n: st.lists(st.tuples(*[st.integers(0, 4)] * n), min_size=1, max_size=30)
)


@given(counts)
def test_moments_that_are_kept_are_those_within_no_other(moments: list[tuple[int, ...]]) -> None:
    each = list(dict.fromkeys(moments))

    def within(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    expected = tuple(a for a in each if not any(within(a, b) for b in each))
    assert _undominated(moments) == expected

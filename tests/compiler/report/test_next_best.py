"""Why the best way is the best."""

from __future__ import annotations

import pytest
from pipecompile.compiler.driver.auto import Trial, Way
from pipecompile.compiler.report.ways import ways_of
from support.plans import hand_made

PARTS = ("computing", "recomputing", "waiting", "exchange and optimizer at the end")
BEST = Trial(
    Way(2, 1, "1f1b"),
    4,
    10.0,
    bubble=0.1,
    parts=dict(zip(PARTS, (8.0, 0.0, 1.0, 1.0), strict=True)),
)


def why(*trials: Trial) -> str:
    return ways_of(hand_made()[0], trials).why


def test_what_the_next_best_takes_longer_for() -> None:
    other = Trial(
        Way(1, 2, "1f1b"), 4, 12.0, parts=dict(zip(PARTS, (7.0, 0.1, 4.0, 0.9), strict=True))
    )
    assert why(other, BEST, Trial(Way(4, 1, "1f1b"), 4, 20.0)) == (
        "the next best (1 × dp 2, zero 0, 4 microbatches) takes 2.00 s longer: "
        "waiting 3.00 s more, computing 1.00 s less"
    )


def test_of_a_sketch_waiting_is_known() -> None:
    other = Trial(Way(1, 2, "1f1b"), 4, 12.0, bubble=0.25, about=True)
    assert why(BEST, other).endswith("takes 2.00 s longer: waiting 2.00 s more")
    other = Trial(Way(1, 2, "1f1b"), 4, 12.0, bubble=0.1, about=True)
    assert why(BEST, other).endswith("takes 2.00 s longer")


@pytest.mark.parametrize(
    "other",
    [Trial(Way(1, 2, "1f1b"), None, None, "no"), Trial(Way(1, 2, "1f1b"), 4, 12.0, "does not fit")],
)
def test_what_is_not_possible_is_no_reason(other: Trial) -> None:
    assert not why(BEST, other)


def test_a_sketch_is_not_the_best_though_it_promises_less() -> None:
    sketch = Trial(Way(1, 2, "1f1b"), 4, 9.9, bubble=0.2, about=True)
    assert why(sketch, BEST) == (
        "the next best (1 × dp 2, zero 0, 4 microbatches) takes no longer by its sketch"
    )


def test_of_equals_it_says_so() -> None:
    assert why(BEST, Trial(Way(1, 2, "1f1b"), 4, 10.0)).endswith("takes as long")

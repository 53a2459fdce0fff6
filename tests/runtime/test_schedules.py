"""Every schedule trains as one process does, whatever ranks, stages on them, microbatches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from pipecompile.passes.schedule.registry import SCHEDULES
from support import jobs, plain
from support.gang import Gang
from support.matrix import quickly

STEPS = 2
Case = tuple[str, int, int, int, int]


def cases() -> list[Case]:
    """(schedule, ranks, stages on each, microbatches, replicas)"""
    found = []
    for name, ranks, virtual, dp in product(SCHEDULES, (2, 3, 4), (1, 2, 3), (1, 2)):
        allowed = SCHEDULES[name].virtual
        if allowed is None or virtual in allowed:
            found += [(name, ranks, virtual, m, dp) for m in (ranks - 1, ranks, 2 * ranks + 1)]
    return found


QUICK: list[Case] = [
    ("gpipe", 2, 2, 5, 1),
    ("interleaved", 2, 2, 5, 1),
    ("interleaved", 2, 3, 2, 2),
    ("zb_h1", 4, 1, 3, 1),
    ("zb", 2, 1, 5, 2),
    ("zb", 2, 2, 5, 1),
    ("zb_v", 2, 2, 5, 2),
    ("v_half", 2, 2, 1, 1),
    ("v_min", 2, 2, 5, 1),
]


def model_for(stages: int) -> str:
    """GPT-2 ties a weight of the first stage and of the last; others have more units."""
    return "gpt2" if stages <= 6 else "llama" if stages <= 9 else "llama-deep"


@pytest.mark.parametrize(
    ("name", "ranks", "virtual", "microbatches", "dp"), quickly(QUICK, cases())
)
def test_training_is_exact(
    gang: Callable[[int], Gang], name: str, ranks: int, virtual: int, microbatches: int, dp: int
) -> None:
    """In processes; gradients, parameters and losses are one device's, bit for bit."""
    model = model_for(ranks * virtual)
    work = model, ranks, dp, microbatches, "adamw", STEPS, name
    expected = jobs.train_plainly(model, dp, microbatches, "adamw", STEPS)
    for found in gang(ranks * dp).run(jobs.train, *work, virtual_stages=virtual):
        plain.assert_equal(found, expected, whole=False)

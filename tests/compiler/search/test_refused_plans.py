"""A sketch fits, and its plan does not: the search goes on, however far the next sketch is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from pipecompile.compiler.driver.auto import Way
from pipecompile.compiler.ir.errors import MemoryBudgetError, OptionError
from pipecompile.compiler.report.ways import ways_of
from pipecompile.compiler.search.model import Model
from pipecompile.compiler.search.search import MOST_REFUSED, ROOMIEST, TIE, search
from pipecompile.compiler.search.sketch import Sketch
from support.searched import made_plan

WAYS = [Way(n + 1, 1, "1f1b") for n in range(40)]
STEPS_S = {way: 1.0 + n * 4 * TIE for n, way in enumerate(WAYS)}


def model(refused: int, fits: Sequence[Way] = ()) -> Model:
    """Of which the plans of the first ways are refused, and the others fit; a later one needs less
    memory."""

    def planned(way: Way) -> Any:
        if way in WAYS[:refused] and way not in fits:
            raise MemoryBudgetError("too much: more ranks", (), None, proven=True)
        return made_plan(STEPS_S[way])

    bounds = {way: step_s / 2 for way, step_s in STEPS_S.items()}
    sketch = lambda way: Sketch(STEPS_S[way], 0.0, 1.0 if way in fits else 2.0)  # noqa: E731
    return Model(bounds.__getitem__, sketch, planned, lambda _: 1)


@pytest.mark.parametrize("refused", range(MOST_REFUSED))
def test_the_next_best_that_fits_is_taken(refused: int) -> None:
    found = search(WAYS, model(refused))
    assert found.best.way == WAYS[refused]
    assert [trial.way for trial in found.trials if trial.reason] == WAYS[:refused]
    assert found.trials[0] == found.best


def test_after_many_the_one_that_needs_least_is_planned() -> None:
    """And not all of them."""
    roomiest = WAYS[MOST_REFUSED]  # of those that were sketched until then
    asked = model(len(WAYS), [roomiest])
    planned: list[Way] = []

    def noted(way: Way) -> Any:
        planned.append(way)
        return asked.plan(way)

    found = search(WAYS, replace(asked, plan=noted))
    assert found.best.way == roomiest
    assert len(planned) <= MOST_REFUSED + ROOMIEST
    assert "do not fit, so that those that need the least memory were planned" in found.told


def test_the_table_says_which_have_no_plan_and_why() -> None:
    found = search(WAYS, model(2))
    plan: Any = SimpleNamespace(
        **{"n_stages": 3, "dp": 1, "virtual_stages": 1, "microbatches": 4, "microbatch_rows": 1},
        **{"microbatch_tokens": 8, "options": {"zero": "0"}, "training": True},
    )
    shown = ways_of(plan, found.trials)
    assert shown.columns["to the\nbest"][:3] == ["chosen", "no plan", "no plan"]
    assert shown.refused[0] == "no plan: 1 × dp 1, zero 0, None microbatches: too much"


def test_where_no_plan_fits_that_is_said() -> None:
    with pytest.raises(OptionError, match=r"no way to use the devices is possible.*too much"):
        search(WAYS, model(len(WAYS)))

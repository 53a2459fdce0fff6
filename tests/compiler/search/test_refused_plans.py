"""A sketch fits, and its plan does not: the search goes on, however far the next sketch is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pipecompile.compiler.driver.auto import Way
from pipecompile.compiler.ir.errors import MemoryBudgetError, OptionError
from pipecompile.compiler.search.search import TIE, Model, search
from pipecompile.compiler.search.sketch import Sketch

WAYS = [Way(n + 1, 1, "1f1b") for n in range(6)]
STEPS_S = {way: 1.0 + n * 4 * TIE for n, way in enumerate(WAYS)}


def model(refused: int) -> Model:
    """Of which the plans of the first ways are refused, and the others fit."""

    def planned(way: Way) -> Any:
        if way in WAYS[:refused]:
            raise MemoryBudgetError("too much", (), None, proven=True)
        stages = [SimpleNamespace(memory=SimpleNamespace(peak=1))]
        told = {"options": {"zero": "0"}, "step_s": STEPS_S[way], "bubble": 0.0, "microbatches": 4}
        return SimpleNamespace(stages=stages, **told)

    bounds = {way: step_s / 2 for way, step_s in STEPS_S.items()}
    sketch = lambda way: Sketch(STEPS_S[way], 0.0, 1.0)  # noqa: E731
    return Model(bounds.__getitem__, sketch, planned, lambda _: 1)


@pytest.mark.parametrize("refused", range(len(WAYS)))
def test_the_next_best_that_fits_is_taken(refused: int) -> None:
    assert search(WAYS, model(refused)).best.way == WAYS[refused]


def test_where_no_plan_fits_that_is_said() -> None:
    with pytest.raises(OptionError, match=r"no way to use the devices is possible.*too much"):
        search(WAYS, model(len(WAYS)))

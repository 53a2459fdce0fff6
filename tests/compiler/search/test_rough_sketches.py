"""Sketches that are rough at first lead to what the others would, and fewer of these are made."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.costs.hardware import H100
from pipecompile.compiler.driver.auto import Way
from pipecompile.compiler.ir.errors import MemoryBudgetError, OptionError, PartitionError
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.search.model import Model
from pipecompile.compiler.search.search import SHOWN, Found, search
from pipecompile.compiler.search.sketch import Sketch
from support.searched import made_plan, of_gpt2


@dataclass
class Case:
    """Ways with what is drawn of each: a bound, a rough sketch, a sketch (infinite: it does not
    fit), bytes of either, and whether its plan fits."""

    bounds: dict[Way, float]
    rough: dict[Way, Sketch]
    sketches: dict[Way, Sketch]
    fits: dict[Way, bool]
    made: Counter[Way] = field(default_factory=Counter)

    @property
    def model(self) -> Model:
        def sketch(way: Way) -> Sketch:
            self.made[way] += 1
            found = self.sketches[way]
            if math.isinf(found.step_s):
                raise MemoryBudgetError("too much", (), None, proven=True)
            return found

        def planned(way: Way) -> Any:
            found = self.sketches[way]
            return made_plan(found.step_s if self.fits[way] else math.inf, found.peak_bytes)

        rough = self.rough.__getitem__
        return Model(self.bounds.__getitem__, sketch, planned, lambda _: 1, rough=rough)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    case = Case({}, {}, {}, {})
    for n in range(draw(st.integers(1, 40))):
        way = Way(n + 1, 1, "1f1b")
        step_s, size = draw(st.floats(1.0, 2.0)), draw(st.floats(1.0, 2.0))
        rough = draw(st.booleans())
        part, less = (draw(st.floats(0.5, 1.0)) if rough else 1.0 for _ in range(2))
        case.rough[way] = Sketch(step_s * part, 0.0, size * less, rough)
        case.bounds[way] = draw(st.floats(0.5, 1.0)) * step_s * part
        lost = rough and draw(st.booleans())
        case.sketches[way] = Sketch(math.inf if lost else step_s, 0.0, size)
        case.fits[way] = not lost and draw(st.booleans())
    return case


def told(case: Case, model: Model) -> tuple[Found | None, set[Way]]:
    """What is found, and what was planned of it."""
    try:
        found = search(list(case.bounds), model)
    except OptionError:
        return None, set()
    return found, {each.way for each in found.trials if each.step_s and not each.about}


@settings(max_examples=100)
@given(cases())
def test_the_search_comes_to_what_it_would_without_them(case: Case) -> None:
    rough, planned = told(case, case.model)
    assert max(case.made.values(), default=1) == 1
    whole, expected = told(case, replace(case.model, rough=None))
    assert planned == expected
    if rough is None or whole is None:
        assert rough is whole
        return
    assert rough.best == whole.best
    shown = [each for each in rough.trials if each.about]
    assert all(each.step_s == case.sketches[each.way].step_s for each in shown)


def test_what_is_far_from_the_best_stays_rough() -> None:
    ways = [Way(n + 1, 1, "1f1b") for n in range(100)]
    rough = {way: Sketch(1.0 + n, 0.0, 1.0, rough=True) for n, way in enumerate(ways)}
    sketches = {way: Sketch(1.1 + n, 0.0, 1.0) for n, way in enumerate(ways)}
    case = Case(dict.fromkeys(ways, 0.5), rough, sketches, dict.fromkeys(ways, True))
    found, _ = told(case, case.model)
    assert found is not None
    assert found.sketched == 100
    assert len(case.made) <= SHOWN + 1


@pytest.mark.parametrize(
    ("schedule", "virtual"), [("interleaved", 2), ("zb_h1", None), ("zb_v", 2)]
)
def test_rough_sketches_take_memory_lightly(schedule: str, virtual: int | None) -> None:
    """They take no longer, and ways that they refuse have no sketch."""
    options = CompileOptions(n_stages=1, optimizer=torch.optim.AdamW)
    way = Way(2, 1, schedule, virtual, zero=0, microbatches=4)
    free = of_gpt2(options, 4, 16, H100).sketch(way)
    refused = kept = 0
    for part in (1.2, 0.8, 0.4, 0.1):
        limited = replace(options, memory=f"{int(part * free.peak_bytes)}B")
        asked = of_gpt2(limited, 4, 16, H100)
        try:
            rough = asked.sketch(way, rough=True)
        except PartitionError:
            refused += 1
            asked._unfit.clear()
            with pytest.raises(PartitionError):
                asked.sketch(way)
            continue
        assert rough.rough
        kept += 1
        try:
            sketch = asked.sketch(way)
        except PartitionError:
            continue
        assert not sketch.rough
        assert rough.step_s <= sketch.step_s * 1.001
    assert kept
    assert refused

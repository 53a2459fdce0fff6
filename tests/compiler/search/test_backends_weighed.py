"""The backend as a part of the search: looked at with the one, compared for the best few."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.costs.cost import least_seconds, node_cost
from pipecompile.compiler.costs.hardware import CPU, H100, Device
from pipecompile.compiler.driver.auto import BACKENDS, Open, Way, weighing
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.profiling.calibration import calibrated
from pipecompile.compiler.search.model import Model
from pipecompile.compiler.search.search import TIE, Found, search
from pipecompile.compiler.search.sketch import Sketch
from pipecompile.compiler.search.space import ways_of
from pipecompile.compiler.search.subject import Subject, twin_of
from support.commands import SMALL_GPT2, inspect, plan_of
from support.searched import brute_forced, made_plan, of_gpt2, of_net

FUSED, EAGER = BACKENDS
REACHED = calibrated(H100, None)
assert REACHED.table is not None
KERNELS = replace(REACHED, table=replace(REACHED.table, host_s=0.0))
"""As if launching took no time, of which sketches know only a part."""
OPEN = Open(divides=True, orders=False, weighs=True)


# -- which are weighed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "costs", "is_cpu", "weighs"),
    [
        ("auto", "calibrated", False, True),
        ("auto", "calibrated", True, False),  # bits are promised there
        ("auto", "roofline", False, False),  # which has the seconds of eager kernels alone
        ("eager", "calibrated", False, False),
        ("inductor", "calibrated", False, False),
    ],
)
def test_what_nobody_has_named_is_weighed(
    backend: str, costs: str, is_cpu: bool, weighs: bool
) -> None:
    options = CompileOptions(n_stages=1, backend=backend, costs=costs)
    open_ = weighing(Open(divides=True, orders=False), options, is_cpu)
    assert open_.weighs is weighs
    ways = ways_of(open_, options, 2, 8)
    assert {way.backend for way in ways} == {FUSED if weighs else None}
    assert {way.of(options).backend for way in ways} == {FUSED if weighs else backend}


# -- with numbers that are made up ----------------------------------------------------------------


def of_numbers(
    planned_s: dict[Way, float], sketched_s: dict[Way, float], bounds_s: dict[Way, float]
) -> Model:
    """Ways whose plans take so long; infinite is what does not fit."""

    def plan(way: Way) -> Any:
        return made_plan(planned_s[way])

    def sketch(way: Way) -> Sketch:
        return Sketch(sketched_s[way], 0.0, 1.0)

    return Model(bounds_s.__getitem__, sketch, plan, lambda _: 1, twin=twin_of)


WAYS = [Way(n + 1, 1, "1f1b", backend=FUSED) for n in range(6)]


def of_ratio(ratio: float, **changed: dict[Way, float]) -> tuple[Found, list[Way]]:
    """Eager steps as multiples of the others; and the eager ways that were sketched."""
    steps_s = {way: 1.0 + 0.02 * n for n, way in enumerate(WAYS)}
    steps_s |= {_twin(way): ratio * step_s for way, step_s in steps_s.items()}
    planned, bounds = (steps_s | changed.get(name, {}) for name in ("planned", "bounds"))
    model, seen = of_numbers(planned, steps_s, {w: 0.9 * s for w, s in bounds.items()}), []

    def noted(way: Way) -> Sketch:
        if way.backend == EAGER:
            seen.append(way)
        return model.sketch(way)

    return search(WAYS, replace(model, sketch=noted)), seen


def _twin(way: Way) -> Way:
    other = twin_of(way)
    assert other is not None
    assert twin_of(other) == way
    return other


def test_the_other_backend_is_looked_at_for_the_best_and_what_bounds_leave() -> None:
    found, seen = of_ratio(1.2)
    assert found.best.way == WAYS[0]
    assert seen == [_twin(WAYS[0])]
    trial = found.trials[found.planned]
    assert (trial.way, trial.about, trial.step_s) == (_twin(WAYS[0]), True, 1.2)


def test_what_is_near_is_planned_with_both() -> None:
    found, _ = of_ratio(1.01)
    near = [w for n, w in enumerate(WAYS) if 1.01 * (1 + 0.02 * n) <= 1 + TIE]
    eager = {t.way for t in found.trials if not t.about and t.way.backend == EAGER}
    assert eager == {_twin(way) for way in near}
    assert found.best.way == WAYS[0]


def test_the_other_backend_is_taken_where_its_plan_is_better() -> None:
    found, _ = of_ratio(0.95)
    assert found.best.way == _twin(WAYS[0])
    found, _ = of_ratio(1.01, planned={_twin(WAYS[0]): 0.9})
    assert found.best.way == _twin(WAYS[0])


def test_where_no_plan_fits_the_other_backend_may() -> None:
    refused = dict.fromkeys(WAYS, math.inf)
    found, _ = of_ratio(1.2, planned=refused)
    assert found.best.way == _twin(WAYS[0])


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(1, 2), st.floats(1.0, 1.5)), min_size=1, max_size=12),
    st.floats(0.3, 1),
)
def test_exact_sketches_lead_to_the_best_of_both(
    drawn: list[tuple[float, float]], bound: float
) -> None:
    """Where one backend's steps are never longer than the other's."""
    ways = [Way(n + 1, 1, "1f1b", backend=FUSED) for n in range(len(drawn))]
    steps_s = {way: step_s for way, (step_s, _) in zip(ways, drawn, strict=True)}
    steps_s |= {_twin(way): s * more for way, (s, more) in zip(ways, drawn, strict=True)}
    bounds = {way: bound * step_s for way, step_s in steps_s.items()}
    found = search(ways, of_numbers(steps_s, steps_s, bounds))
    assert found.best.step_s == min(steps_s.values())


# -- with models ----------------------------------------------------------------------------------


def check(asked: Subject, ways: list[Way]) -> Found:
    """Both backends of every way are planned."""
    both = itertools.chain.from_iterable((way, _twin(way)) for way in ways)
    found, steps_s = brute_forced(asked, ways, both)
    assert found.planned < len(steps_s)
    return found


def test_brute_force_over_both_backends() -> None:
    options = CompileOptions(n_stages=1, optimizer=torch.optim.SGD)
    asked = of_net(options, 2, 8, REACHED)
    found = check(asked, ways_of(OPEN, options, 2, 8))
    assert found.best.way.backend == FUSED
    fused, eager = (asked.built[w].plan for w in (found.best.way, _twin(found.best.way)))
    assert asked.built[found.best.way].fused is not None
    assert asked.built[_twin(found.best.way)].fused is None
    assert fused.step_s < eager.step_s
    assert 'backend="inductor", as with "eager" a step would take ' in found.told  # by a sketch
    more = eager.step_s / fused.step_s - 1
    assert f"would take {more:.1%} longer" in asked.weighed(found.best.way)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [None, 0.9], ids=["roomy", "tight"])
def test_brute_force_over_both_backends_and_everything(memory: float | None) -> None:
    open_ = replace(OPEN, orders=True)
    options = CompileOptions(n_stages=1, zero="auto", optimizer=torch.optim.AdamW)
    if memory is not None:
        ways = ways_of(open_, options, 2, 8)
        peak = search(ways, of_gpt2(options, 2, 8, KERNELS).model).best.peak_bytes
        options = replace(options, memory=f"{int(memory * peak)}B")
    check(of_gpt2(options, 2, 8, KERNELS), ways_of(open_, options, 2, 8))


def test_bounds_are_below_what_fusions_take() -> None:
    """Of every operator, by kernels one by one and by fused ones."""
    asked = of_gpt2(CompileOptions(n_stages=1), 1, 4, REACHED)
    graph = asked._outline(Way(1, 1, "1f1b", microbatches=1)).graph
    sums = {}
    for fuses in (False, True):
        device = REACHED.fusing(fuses)
        pairs = [(least_seconds(n, device), node_cost(n, device).seconds) for n in graph.ops()]
        assert all(least <= takes * (1 + 1e-9) for least, takes in pairs)
        sums[fuses] = [sum(each) for each in zip(*pairs, strict=True)]
    assert all(a < 0.95 * b for a, b in zip(sums[True], sums[False], strict=True))


@pytest.mark.parametrize(
    ("device", "backend", "told"),
    [
        (calibrated(CPU, None), "auto", r'"inductor" would take \d+% less of a step'),
        (H100, "auto", r"eager kernels by costs=\"roofline\", would"),
        (H100, "eager", ""),
    ],
    ids=["cpu", "roofline", "named"],
)
def test_what_is_not_weighed_is_told(device: Device, backend: str, told: str) -> None:
    options = CompileOptions(n_stages=1, optimizer=torch.optim.SGD, backend=backend)
    asked = of_gpt2(options, 1, 4, device)
    said = asked.besides(Way(1, 1, "1f1b", microbatches=1))
    assert said.startswith(f'all with backend="{backend}" and compress="off"')
    assert bool(told) == ("inductor" in said)
    if told:
        assert re.search(told, said)


@pytest.mark.slow
def test_inspect_weighs_backends(capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"{SMALL_GPT2} --stages auto --devices 2 --batch 4 --device h100 --costs calibrated"
    said = inspect(flags, capsys)
    assert "backend" in said
    assert " eager " in said
    assert said.count("chosen") + said.count("this: ") == 1
    plan = plan_of(flags, capsys)
    why = dict(plan["notes"])["backend"]
    assert why.startswith('backend="inductor", as with "eager" a step would take')
    assert plan["tried"][0]["backend"] == FUSED
    assert EAGER in {trial["backend"] for trial in plan["tried"]}
    named = plan_of(f"{flags} --backend eager", capsys)
    assert {trial["backend"] for trial in named["tried"]} == {None}
    assert named["step_s"] > plan["step_s"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sketches_know_what_is_launched(backend: str) -> None:
    """Of small kernels, whose launches take longer than they do."""
    options = CompileOptions(n_stages=1, optimizer=torch.optim.SGD)
    asked = of_gpt2(options, 2, 8, REACHED)
    way = Way(2, 1, "1f1b", microbatches=2, backend=backend)
    plan_s = asked.model.plan(way).step_s
    kernels_s = of_gpt2(options, 2, 8, KERNELS).sketch(way).step_s
    assert asked.sketch(way).step_s == pytest.approx(plan_s, rel=0.25)
    assert kernels_s < 0.6 * plan_s

"""What bounds exclude is not better, and the search finds what brute force finds."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.costs.hardware import CPU, H100, Device
from pipecompile.compiler.costs.topology import ORDERS, Topology
from pipecompile.compiler.driver.auto import Open, Trial, Way
from pipecompile.compiler.driver.builder import Builder
from pipecompile.compiler.ir.actions import Kind
from pipecompile.compiler.ir.errors import (
    OptionError,
    PartitionError,
)
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.search import subject
from pipecompile.compiler.search.bounds import Microbatch, least_compute_s
from pipecompile.compiler.search.model import Model
from pipecompile.compiler.search.search import MOST_PLANNED, SHOWN, TIE, search
from pipecompile.compiler.search.sketch import Sketch, sketch_of
from pipecompile.compiler.search.space import ways_of
from pipecompile.compiler.search.subject import SOLVED_S, Subject
from pipecompile.passes.schedule.load import timed
from pipecompile.passes.schedule.registry import SCHEDULES, ScheduleKind
from support.searched import brute_forced, made_plan, of_gpt2, of_net

# -- bounds -------------------------------------------------------------------------------------


@st.composite
def divided(draw: st.DrawFn) -> tuple[str, int, int, list[tuple[float, float, float]]]:
    """A schedule, ranks, microbatches, and per stage seconds of F, of B and of W."""
    kind = SCHEDULES[draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zb_h1", "zb"]))]
    ranks = draw(st.integers(1, 4))
    virtual = 2 if kind.name == "interleaved" else 1
    m = ranks * draw(st.integers(1, 3))
    second = st.floats(0.1, 3.0)
    stages = [(draw(second), draw(second), draw(second)) for _ in range(ranks * virtual)]
    return kind.name, ranks, m, stages


@settings(max_examples=60)
@given(divided())
def test_no_division_is_faster_than_the_bound(
    case: tuple[str, int, int, list[tuple[float, float, float]]],
) -> None:
    """However uneven the stages are, with free transfers."""
    name, ranks, m, stages = case
    kind = SCHEDULES[name]
    splits = kind.splits_backward
    shape = kind.shape(ranks, m, len(stages) // ranks)
    compute_s = {}
    for s, (f, b, w) in enumerate(stages):
        compute_s |= {(s, Kind.F): f, (s, Kind.B): b if splits else b + w, (s, Kind.W): w}
    real = timed(kind.order(shape), shape, compute_s, {}).step_s
    sums = [sum(each) for each in stages]
    part = min(f / (f + b + w) for f, b, w in stages)
    one = Microbatch(sum(sums), 0.0, part)
    bound = least_compute_s(one, m, ranks, len(stages) // ranks, splits)
    assert bound <= real * (1 + 1e-9)


def test_the_bound_is_near_what_even_stages_take() -> None:
    """It has most of the bubble of 1F1B in it."""
    kind, ranks, m = SCHEDULES["1f1b"], 8, 16
    shape = kind.shape(ranks, m)
    compute_s = {(s, k): 1.0 for s in range(ranks) for k in (Kind.F, Kind.B)}
    real = timed(kind.order(shape), shape, compute_s, {}).step_s
    bound = least_compute_s(Microbatch(2.0 * ranks), m, ranks, 1, splits=False)
    assert m * 2.0 < 0.85 * bound < real


# -- the search, with numbers that are made up ----------------------------------------------------


@dataclass
class Made:
    """A model whose ways take what was drawn."""

    steps_s: dict[Way, float]
    bounds: dict[Way, float]
    errors: dict[Way, float]
    nodes: int = 1

    @property
    def model(self) -> Model:
        def planned(way: Way) -> Any:
            return made_plan(self.steps_s[way])

        def sketch(way: Way) -> Sketch:
            return Sketch(planned(way).step_s * self.errors[way], 0.0, 1.0)

        return Model(self.bounds.__getitem__, sketch, planned, lambda _: self.nodes)


@st.composite
def made(draw: st.DrawFn, error: float) -> Made:
    ways = [Way(n + 1, 1, "1f1b") for n in range(draw(st.integers(1, 40)))]
    step = st.one_of(st.floats(1.0, 3.0), st.just(math.inf))
    steps_s = {way: draw(step) for way in ways}
    errors = {way: draw(st.floats(1 - error, 1 + error)) for way in ways}
    bounds = {}
    for way in ways:
        known = steps_s[way] if math.isfinite(steps_s[way]) else 1.0
        bounds[way] = draw(st.floats(0.2, 1.0)) * known * min(1.0, errors[way])
    return Made(steps_s, bounds, errors)


@settings(max_examples=100)
@given(made(error=0.0))
def test_exact_sketches_lead_to_the_best(case: Made) -> None:
    best_s = min(case.steps_s.values())
    if math.isinf(best_s):
        with pytest.raises(OptionError, match="too much"):
            search(list(case.steps_s), case.model)
        return
    found = search(list(case.steps_s), case.model)
    assert found.best.step_s == best_s
    assert found.pruned + found.sketched <= found.ways == len(case.steps_s)


@settings(max_examples=100)
@given(made(error=TIE / 2))
def test_sketches_that_are_off_cost_no_more_than_they_are_off(case: Made) -> None:
    best_s = min(case.steps_s.values())
    if math.isfinite(best_s):
        found = search(list(case.steps_s), case.model)
        assert found.best.step_s is not None
        assert found.best.step_s <= best_s * (1 + 1.1 * TIE)
        assert sum(not t.about for t in found.trials if t.step_s) <= SHOWN


def test_what_a_bound_excludes_is_not_looked_at() -> None:
    ways = [Way(n + 1, 1, "1f1b") for n in range(10)]
    steps_s = {way: 1.0 + i for i, way in enumerate(ways)}
    found = search(ways, Made(steps_s, dict(steps_s), dict.fromkeys(ways, 1.0)).model)
    assert (found.sketched, found.pruned) == (1, 9)
    assert "10 ways: 9 cannot be better by their bounds, 1 sketched, 1 planned" in found.told


def test_large_graphs_are_planned_less_often_and_that_is_said() -> None:
    ways = [Way(n + 1, 1, "1f1b") for n in range(10)]
    equal = dict.fromkeys(ways, 1.0)
    found = search(ways, Made(equal, equal, equal, nodes=15_000).model)
    assert found.planned == 2
    assert "not all that are as good by their sketches were planned" in found.told


@settings(max_examples=100)
@given(made(error=TIE), st.sampled_from([1, 9_000, 15_000, 50_000]))
def test_what_is_planned_is_what_all_sketches_would_lead_to(case: Made, nodes: int) -> None:
    """However few of them were made."""
    case.nodes = nodes
    sketches = {
        way: case.model.sketch(way).step_s for way, s in case.steps_s.items() if math.isfinite(s)
    }
    if not sketches:
        return
    ordered = sorted(sketches, key=sketches.__getitem__)
    most = min(SHOWN, max(1, MOST_PLANNED // nodes))
    near, best_s = list[Way](), math.inf
    for way in ordered:
        if sketches[way] <= max(sketches[ordered[0]] * (1 + TIE), best_s):
            near.append(way)
            best_s = min([best_s, *(case.steps_s[each] for each in near[:most])])
    found = search(list(case.steps_s), case.model)
    assert {trial.way for trial in found.trials if trial.step_s and not trial.about} == {
        *near[:most]
    }
    assert ("not all that are as good" in found.told) == (len(near) > most)
    worse = sum(bound >= (found.best.step_s or 0.0) for bound in case.bounds.values())
    assert found.pruned <= worse


def test_no_more_is_sketched_than_is_planned() -> None:
    """Where two are planned, those whose bounds are above the second sketch are not asked for."""
    ways = [Way(n + 1, 1, "1f1b") for n in range(10)]
    steps_s = {way: 1.0 + i / 1000 for i, way in enumerate(ways)}
    bounds = {way: step_s - 1e-4 for way, step_s in steps_s.items()}
    found = search(ways, Made(steps_s, bounds, dict.fromkeys(ways, 1.0), nodes=20_000).model)
    assert (found.planned, found.sketched, found.pruned) == (2, 3, 7)
    assert found.best.way == ways[0]


# -- the space ------------------------------------------------------------------------------------


def test_the_space_has_what_is_open() -> None:
    options = CompileOptions(n_stages=1, zero="auto")
    open_ = Open(divides=True, orders=True)
    ways = ways_of(open_, options, 4, 16)
    assert len(set(ways)) == len(ways)
    assert {(w.n_stages, w.dp) for w in ways} == {(1, 4), (2, 2), (4, 1)}
    assert {w.zero for w in ways if w.dp > 1} == {0, 1, 2, 3}
    assert {w.zero for w in ways if w.dp == 1} == {0}
    assert {w.microbatches for w in ways if w.dp == 1} == {1, 2, 4, 8, 16}
    given = replace(options, zero=0, microbatches=4)
    assert {(w.zero, w.microbatches) for w in ways_of(open_, given, 4, 16)} == {(None, 4)}


def test_the_space_keeps_to_limits_of_sessions() -> None:
    """The global batch is cut into as many microbatches, whatever the replicas."""
    options = CompileOptions(n_stages=1, microbatches=None)
    held = Open(True, False, None, stages=(2, 4), global_microbatches=8)
    ways = ways_of(held, options, 4, 16)
    assert [(w.n_stages, w.dp, w.microbatches) for w in ways] == [(2, 2, 4), (4, 1, 8)]
    free = ways_of(replace(held, global_microbatches=None), options, 4, 16)
    assert {(w.n_stages, w.microbatches) for w in free} > {(2, 1), (2, 8), (4, 1), (4, 16)}
    settled = replace(held, stages=(2, 2), global_microbatches=None)
    assert ways_of(settled, replace(options, zero="auto"), 4, 16) == [Way(2, 2, "1f1b")]


# -- against brute force --------------------------------------------------------------------------


def check(asked: Subject, ways: Sequence[Way]) -> tuple[Trial, int]:
    """Returns:
    The search's choice, and the least bytes that any plan takes.
    """
    found, _ = brute_forced(asked, ways, ways)
    assert found.planned < len(ways)
    peaks = (max(s.memory.peak for s in each.plan.stages) for each in asked.built.values())
    return found.best, min(peaks)


@pytest.mark.parametrize("given_s", [1.0, 30.0])
def test_plans_get_no_more_of_the_solver_than_tells_them_apart(given_s: float) -> None:
    options = CompileOptions(n_stages=1, optimizer=torch.optim.SGD, time_limit_s=given_s)
    asked = of_net(options, 2, 8, CPU)
    seen: list[float] = []
    builder = asked._builder

    def noted(tried: CompileOptions) -> Builder:
        seen.append(tried.time_limit_s)
        return builder(tried)

    asked._builder = noted
    asked.model.plan(Way(1, 2, "1f1b", zero=0, microbatches=2))
    assert seen == [min(given_s, SOLVED_S)]


def test_no_order_is_looked_for_where_units_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = of_net(CompileOptions(n_stages=1, optimizer=torch.optim.SGD), 64, 64, CPU)
    monkeypatch.setattr(ScheduleKind, "order", lambda *_: pytest.fail("it was looked for"))
    with pytest.raises(PartitionError, match=r"the model has only \d+ units"):
        asked.sketch(Way(64, 1, "zb", zero=0, microbatches=64))


def test_what_does_not_fit_is_not_divided_again_where_it_holds_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each level of ZeRO that is refused so would have been by itself."""
    options = CompileOptions(n_stages=1, zero="auto", optimizer=torch.optim.AdamW, memory="100000B")
    ways = ways_of(Open(divides=True, orders=True), options, 4, 8)
    asked = of_net(options, 4, 8, CPU)
    divided: list[Any] = []

    def noted(*given: Any, **how: Any) -> Sketch:
        divided.append(given)
        return sketch_of(*given, **how)

    monkeypatch.setattr(subject, "sketch_of", noted)
    refused: list[Way] = []
    known = 0
    for way in sorted(ways, key=lambda way: -(way.zero or 0)):
        count = len(divided)
        try:
            asked.sketch(way)
        except PartitionError as error:
            known += len(divided) == count and not re.search("alone|has only", str(error))
            refused.append(way)
    assert 0 < known < len(refused) < len(ways)
    monkeypatch.undo()
    for way in refused:
        with pytest.raises(PartitionError):
            sketched_again(asked, way)


def sketched_again(asked: Subject, way: Way) -> Sketch:
    """As if no other way had been sketched."""
    asked._unfit.clear()
    return asked.sketch(way)


SENDING = replace(CPU, send_share=1.0)
SLOW_LINK = H100.with_link(1e9, 1e-5)


def test_brute_force_over_microbatches() -> None:
    options = CompileOptions(n_stages=1, optimizer=torch.optim.SGD)
    ways = ways_of(Open(divides=True, orders=False), options, 2, 8)
    assert len(ways) == 7
    check(of_net(options, 2, 8, CPU), ways)


def test_brute_force_over_inference() -> None:
    """The same of forwards alone, which have no order and nothing to divide."""
    options = CompileOptions(n_stages=1, training=False)
    ways = ways_of(Open(divides=True, orders=False), options, 2, 8)
    assert {way.zero for way in ways} <= {None, 0}
    check(of_net(options, 2, 8, CPU), ways)


@pytest.mark.parametrize("precision", ["fp32", "bf16_params"])
@pytest.mark.parametrize("device", [CPU, SLOW_LINK], ids=["cpu", "slow links"])
def test_sketches_of_inference_are_near_plans(precision: str, device: Device) -> None:
    options = CompileOptions(n_stages=1, training=False, precision=precision)
    asked = of_net(options, 2, 8, device)
    way = Way(2, 1, "1f1b", zero=0, microbatches=4)
    sketch, plan = asked.sketch(way), asked.model.plan(way)
    assert not plan.training
    assert sketch.step_s == pytest.approx(plan.step_s, rel=TIE)
    assert sketch.bubble == pytest.approx(plan.bubble, abs=TIE)
    peak = max(stage.memory.peak for stage in plan.stages)
    assert sketch.peak_bytes == pytest.approx(peak, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("device", [CPU, SLOW_LINK], ids=["cpu", "slow links"])
@pytest.mark.parametrize("make", [of_net, of_gpt2])
def test_brute_force_over_everything(make: Any, device: Device) -> None:
    """Without a limit, and with less memory than the best took, where that is enough for any."""
    open_ = Open(divides=True, orders=True)
    options = CompileOptions(
        n_stages=1, zero="auto", optimizer=torch.optim.AdamW, max_grad_norm=1.0
    )
    best, least = check(make(options, 2, 8, device), ways_of(open_, options, 2, 8))
    memory = max(int(0.9 * best.peak_bytes), int(1.05 * least))
    tight = replace(options, memory=f"{memory}B")
    found, _ = check(make(tight, 2, 8, device), ways_of(open_, tight, 2, 8))
    assert found.peak_bytes <= memory


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_h1"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("memory", [None, "1GiB"], ids=["divided", "kept"])
def test_sketches_are_near_plans(schedule: str, zero: int, memory: str | None) -> None:
    """Also where what is divided is kept whole over a step, as sending takes the processor."""
    options = CompileOptions(
        n_stages=1, zero="auto", optimizer=torch.optim.AdamW, memory=memory, max_grad_norm=1.0
    )
    device = CPU if memory is None else SENDING
    asked = of_gpt2(options, 4, 16, device)
    virtual = 2 if schedule == "interleaved" else None
    way = Way(2, 2, schedule, virtual, zero=zero, microbatches=4)
    sketch = asked.sketch(way)
    assert sketch.step_s == pytest.approx(asked.model.plan(way).step_s, rel=TIE)


def test_sketches_know_what_is_kept_whole() -> None:
    """In the memory that a way has left, where that shortens its step."""
    given = {"n_stages": 1, "zero": "auto", "optimizer": torch.optim.AdamW}
    steps_s = {}
    for keep, memory in (("auto", "1GiB"), ("nothing", "1GiB"), ("auto", None)):
        options = CompileOptions(**given, memory=memory, zero_keep=keep)
        asked = of_net(options, 4, 16, SENDING)
        way = Way(1, 4, "1f1b", zero=3, microbatches=4)
        steps_s[keep, memory] = asked.sketch(way).step_s
        assert steps_s[keep, memory] == pytest.approx(asked.model.plan(way).step_s, rel=TIE)
    assert steps_s["auto", None] == steps_s["nothing", "1GiB"] > 1.2 * steps_s["auto", "1GiB"]


@pytest.mark.parametrize(("rows", "order"), [(4, "replicas"), (4096, "pipeline")])
def test_what_sends_most_shares_a_machine(rows: int, order: str) -> None:
    """Weights stay as large whatever the rows, and messages do not."""
    slow = replace(H100, topology=Topology(2, bytes_per_s=1e8, latency_s=0.0))
    given = {"n_stages": 2, "dp": 2, "microbatches": 2}
    subject = of_net(CompileOptions(**given, optimizer=torch.optim.SGD), 4, rows, slow)
    ways = ways_of(Open(False, False, places=True), subject.options, 4, rows)
    assert [way.placement for way in ways] == list(ORDERS)
    found = search(ways, subject.model)
    assert found.best.way.placement == order
    plan = subject.built[found.best.way].plan
    assert plan.options["placement"] == order
    steps_s = {way: subject.sketch(way).step_s for way in ways}
    assert min(steps_s, key=steps_s.__getitem__) == found.best.way


def test_places_are_open_only_where_neighbours_differ() -> None:
    ways = Open(True, False, places=True).ways(CompileOptions(n_stages=1), 4)
    found = [(way.n_stages, way.dp, way.placement) for way in ways]
    assert found == [(1, 4, None), (2, 2, "pipeline"), (2, 2, "replicas"), (4, 1, None)]
    one = Open(True, False, 4, stages=(2, 2), places=True)
    limited = ways_of(one, CompileOptions(n_stages=1), 4, 16)
    assert [(way.placement, way.microbatches) for way in limited] == [(o, None) for o in ORDERS]

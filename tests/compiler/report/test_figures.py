"""Figures that people read are those of the plan: worked out here a second time, from its data."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import pipecompile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.costs.hardware import CPU
from pipecompile.compiler.driver.auto import Trial, Way
from pipecompile.compiler.ir.graph import overwritten
from pipecompile.compiler.ir.problem import Kept, Option, Problem, solution_of
from pipecompile.compiler.options.options import CompileOptions, parse_bytes
from pipecompile.compiler.plan.plan import Plan, StagePlan, Transfer
from pipecompile.compiler.planning.advice import advice, gib
from pipecompile.compiler.report import hints, quantities
from pipecompile.compiler.report.report import Extras, write_report
from support import models
from support.plans import hand_made

SIZES = {
    "": 1.0,
    "B": 1.0,
    "bytes": 1.0,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "TiB": 2.0**40,
}
SIZES |= {f"{prefix}FLOP": 1000.0**i for i, prefix in enumerate(("", "K", "M", "G", "T", "P"))}
SIZES |= {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "K": 1e3, "M": 1e6}
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"


def close(text: str, expected: float, unit: str = "") -> bool:
    """Whether a text such as ``1,234.5 MiB`` is a number, rounded to the digits that it has."""
    number, _, written = text.partition(" ")
    size = SIZES[unit or written]
    digits = len(number.partition(".")[2])
    slack = (0.5 + 1e-6) * 10.0**-digits * size
    return abs(float(number.replace(",", "")) * size - expected) <= slack


# -- single numbers -------------------------------------------------------------------------------

BYTES = st.integers(0, 2**50)


@given(BYTES)
def test_bytes(number: int) -> None:
    for text in (quantities.bytes_text(number), quantities.bytes_scale([number]).text(number)):
        assert close(text, number, "" if " " in text else quantities.bytes_scale([number]).unit)
    amount = float(quantities.bytes_text(number).partition(" ")[0].replace(",", ""))
    assert amount <= 1024


@given(st.integers(0, 10**18))
def test_flops(number: int) -> None:
    assert close(quantities.flops_text(number), number)
    assert float(quantities.flops_text(number).partition(" ")[0].replace(",", "")) <= 1000


@given(st.floats(1e-6, 1e5))
def test_seconds(number: float) -> None:
    """With three digits at least, from a hundredth of a millisecond on."""
    text = quantities.seconds_text(number)
    assert close(text, number)
    assert number < 1e-5 or abs(1 - seconds(text) / number) < 6e-3


def seconds(text: str) -> float:
    number, unit = text.split()
    return float(number.replace(",", "")) * SIZES[unit]


@given(st.floats(1e-4, 1e9))
def test_rates_have_three_digits(number: float) -> None:
    assert rate(quantities.rate_text(number)) == pytest.approx(number, rel=5e-3)


def test_a_column_has_the_unit_of_its_largest_number() -> None:
    assert quantities.bytes_scale([3, 5 * 2**20]).unit == "MiB"
    assert quantities.bytes_scale([-3 * 2**30, 5]).unit == "GiB"
    assert quantities.count_scale([1, 5e9]).unit == "M"
    assert quantities.seconds_scale([1e-5, 2e-3]).unit == "ms"
    assert quantities.counted(1, "microbatch") == "1 microbatch"
    assert quantities.counted(1200, "microbatch") == "1,200 microbatches"


@given(BYTES)
def test_bytes_in_advice(number: int) -> None:
    """In a unit that shows them."""
    assert close(gib(number), number)
    assert float(gib(number).partition(" ")[0].replace(",", "")) >= (1 if number else 0)


@given(st.integers(1, 2**45))
def test_suggested_memory_is_enough_and_taken_back(number: int) -> None:
    """What --memory makes of it is not less, and hardly more."""
    taken = parse_bytes(hints._rounded_up(number), "memory")
    assert number - 1 <= taken <= 1.1 * number + 1


# -- the report -----------------------------------------------------------------------------------

COUNT, SIZE, SECONDS = st.integers(1, 10**14), st.integers(1, 2**40), st.floats(1e-3, 99.0)


HELD = ("weights", "copies", "grads", "states", "buffers", "constants", "batch")


def held(stage: StagePlan) -> int:
    """All the time."""
    return sum(getattr(stage.memory, name) for name in HELD)


@st.composite
def stages(draw: st.DrawFn, like: StagePlan) -> StagePlan:
    sizes = {name: draw(SIZE) for name in HELD}
    return replace(
        like,
        param_count=draw(st.integers(10**6, 10**11)),
        param_bytes=draw(SIZE),
        forward_flops=draw(COUNT),
        backward_flops=draw(COUNT),
        recompute_flops=draw(COUNT),
        forward_s=draw(SECONDS),
        backward_s=draw(SECONDS),
        recompute_s=draw(SECONDS),
        recomputes={"matmul": 3, "norm": 1},
        stash_bytes=draw(SIZE),
        in_flight=draw(st.integers(1, 9)),
        memory=replace(like.memory, **sizes, peak=sum(sizes.values()) + draw(SIZE)),
        sends=tuple(
            Transfer(1, "forward", size, ("x",)) for size in draw(st.lists(SIZE, max_size=2))
        ),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """The plan that was made by hand, with other numbers everywhere."""
    plan, _ = hand_made()
    (tied,) = plan.tied
    return replace(
        plan,
        stages=tuple(draw(stages(stage)) for stage in plan.stages),
        dp=draw(st.integers(1, 9)),
        microbatches=draw(st.integers(1, 99)),
        microbatch_rows=draw(st.integers(1, 99)),
        microbatch_tokens=draw(st.integers(0, 9999)),
        budget_bytes=draw(st.none() | st.integers(2**20, 2**45)),
        step_s=draw(SECONDS),
        bubble=draw(st.floats(0, 1)),
        tied=(replace(tied, stages=(0, 1), part_bytes=draw(SIZE)),),
    )


def shown(plan: Plan, extras: Extras | None = None, closing_s: float = 0.25) -> str:
    stream = io.StringIO()
    timeline = replace(hand_made()[1], closing_s=(closing_s / 2, closing_s))
    write_report(plan, timeline, stream, extras)
    return " ".join(stream.getvalue().split())


def table(plan: Plan, last: str) -> tuple[list[str], list[list[str]]]:
    """Units, and cells per stage, of the table whose last column is ``last``."""
    stream = io.StringIO()
    write_report(plan, hand_made()[1], stream)
    lines = stream.getvalue().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("stage") and last in line)
    rows = [line.replace(" × ", "×").split() for line in lines[at + 1 : at + 3]]
    return lines[at].split(), rows


@settings(max_examples=40)
@given(plans())
def test_what_stages_have(plan: Plan) -> None:
    units, rows = table(plan, "units")
    for stage, row in zip(plan.stages, rows, strict=True):
        stash, _, in_flight = row[7].partition("×")
        assert int(in_flight) == stage.in_flight
        expected = (stage.param_count, stage.param_bytes, stage.forward_s, stage.backward_s)
        expected += (stage.recompute_s, stage.stash_bytes, sum(t.bytes for t in stage.sends))
        for text, number, unit in zip([*row[2:7], stash, row[8]], expected, units[2:], strict=True):
            assert close(text, number, unit)


@settings(max_examples=40)
@given(plans())
def test_what_memory_is_made_of(plan: Plan) -> None:
    text = shown(plan)
    unit = re.search(r"memory of a stage at its peak, (\w+)", text)
    assert unit is not None
    _, rows = table(plan, "mizer")
    for stage, row in zip(plan.stages, rows, strict=True):
        m = stage.memory
        expected = (m.weights + m.copies, m.grads, m.states, m.buffers + m.constants + m.batch)
        for cell, number in zip(row[1:6], (*expected, m.peak - held(stage)), strict=True):
            assert close(cell, number, unit[1])
        peak = row[7] if plan.budget_bytes is None else row[-3]
        assert close(peak, m.peak, unit[1])
        if plan.budget_bytes is not None:
            assert close(row[-1], plan.budget_bytes, unit[1])


def figure(text: str, pattern: str) -> str:
    """What stands for ``#``, a number with or without a unit."""
    found = re.search(pattern.replace("#", rf"({NUMBER}(?: [KMGTPm]?i?(?:B|FLOP|s))?)"), text)
    assert found is not None, (pattern, text)
    return found[1]


def rate(text: str) -> float:
    return float(text.replace(",", ""))


@settings(max_examples=40)
@given(plans(), st.floats(0.01, 50))
def test_how_fast_it_is(plan: Plan, closing_s: float) -> None:
    text = shown(plan, closing_s=closing_s)
    m = plan.microbatches
    rows = m * plan.microbatch_rows * plan.dp
    assert figure(text, r"× dp \d+ = # rank") == f"{2 * plan.dp:,}"
    assert figure(text, r"per replica, # row") == f"{rows:,}"
    assert figure(text, rf"{m} microbatch(?:es)? of #") == f"{plan.microbatch_rows:,}"
    assert close(figure(text, "step: # predicted"), plan.step_s)
    assert close(figure(text, "predicted, # of it"), closing_s)
    assert rate(figure(text, "# rows/s")) == pytest.approx(rows / plan.step_s, rel=5e-3)
    if plan.microbatch_tokens:
        expected = m * plan.dp * plan.microbatch_tokens / plan.step_s
        assert rate(figure(text, "# tokens/s")) == pytest.approx(expected, rel=5e-3)
    else:
        assert "tokens/s" not in text
    each = [s.forward_s + s.backward_s + s.recompute_s for s in plan.stages]
    assert figure(text, "bottleneck: stage #") == str(each.index(max(each)))
    assert close(figure(text, r"bottleneck: stage \d, # per"), max(each))
    assert close(figure(text, "per microbatch, # × the mean"), 2 * max(each) / sum(each))
    assert close(figure(text, "bubble: #%"), 100 * plan.bubble)
    assert close(figure(text, r"\(S−1\)/\(m\+S−1\) = #%"), 100 / (m + 1))
    for s, stage in enumerate(plan.stages):
        again = rf"stage {s}: matmul of 3 units; norm of 1 unit \(of 4\): "
        assert close(figure(text, f"{again}#"), stage.recompute_s)
        share = 100 * stage.recompute_s / each[s]
        assert close(figure(text, f"{again}.*?, #% of its time"), share)


@settings(max_examples=40)
@given(plans())
def test_how_much_it_takes(plan: Plan) -> None:
    text = shown(plan)
    m = plan.microbatches
    for what, flops in (
        ("forward", [s.forward_flops for s in plan.stages]),
        ("backward", [s.backward_flops for s in plan.stages]),
        ("recomputed", [s.recompute_flops for s in plan.stages]),
    ):
        found = re.search(rf"({NUMBER} [KMGTP]?FLOP) {what}", text)
        assert found is not None
        assert close(found[1], m * plan.dp * sum(flops))
    sent = m * sum(t.bytes for s in plan.stages for t in s.sends)
    assert close(figure(text, "transfers: # per step of one replica"), sent)
    peaks = [s.memory.peak for s in plan.stages]
    assert close(figure(text, "memory: at most #, on"), max(peaks))
    assert figure(text, "B, on stage # in") == str(peaks.index(max(peaks)))
    if plan.budget_bytes is not None:
        assert close(figure(text, "#% of the budget"), 100 * max(peaks) / plan.budget_bytes)
    assert close(figure(text, r"once per step \(1 × #\)"), plan.tied[0].part_bytes)


@settings(max_examples=20)
@given(plans(), SECONDS, SECONDS)
def test_divisions(plan: Plan, one_s: float, two_s: float) -> None:
    """The shares of the same rows per second; the one that was taken is the plan's."""
    trials = (Trial(Way(1, 2, "1f1b"), 3, one_s), Trial(Way(2, 1, "1f1b"), 3, two_s))
    text = shown(plan, Extras(trials=trials))
    amount = plan.microbatches * plan.dp * (plan.microbatch_tokens or plan.microbatch_rows)
    for n, dp, step_s in ((1, 2, one_s), (2, 1, two_s)):
        line = re.search(
            rf" {n} × {dp} 3 ({NUMBER} \w+) ({NUMBER}(?:e-\d+)?) 0.0% 0 (chosen|this|{NUMBER})",
            text,
        )
        assert line is not None, text
        assert close(line[1], step_s)
        assert rate(line[2]) == pytest.approx(amount / step_s, rel=5e-3)
        if n == 1:
            assert close(line[3], one_s / min(one_s, two_s))


@settings(max_examples=5)
@given(plans(), SECONDS)
def test_ways_of_one_division_are_no_schedules(plan: Plan, step_s: float) -> None:
    """All others may be ruled out by their bounds, and have no rows then."""
    ways = (Way(1, 8, "1f1b", zero=level) for level in (2, 3))
    text = shown(plan, Extras(trials=tuple(Trial(way, 4, step_s) for way in ways)))
    assert "ways to use 8 devices" in text
    orders = (Way(1, 8, name) for name in ("1f1b", "gpipe"))
    text = shown(plan, Extras(trials=tuple(Trial(way, 4, step_s) for way in orders)))
    assert "ways to use" not in text


@settings(max_examples=20)
@given(plans(), plans())
def test_what_precision_saves(plan: Plan, fp32: Plan) -> None:
    plan = replace(plan, options={**plan.options, "precision": "bf16 grads=bf16"})
    text = shown(plan, Extras(fp32=fp32))

    def sent(p: Plan) -> int:
        return sum(t.bytes for s in p.stages for t in s.sends)

    for name, mine, theirs in (
        ("stash of a microbatch", *(sum(s.stash_bytes for s in p.stages) for p in (plan, fp32))),
        ("sent per microbatch", sent(plan), sent(fp32)),
        ("largest peak of a stage", *(max(s.memory.peak for s in p.stages) for p in (plan, fp32))),
        ("predicted step", plan.step_s, fp32.step_s),
    ):
        row = re.search(rf"{name} ({NUMBER} \w+) ({NUMBER} \w+) ([-+–][\d]*)", text)
        assert row is not None, text
        assert close(row[1], mine)
        assert close(row[2], theirs)
        if theirs:
            assert abs(int(row[3]) - 100 * (mine / theirs - 1)) <= 0.5 + 1e-6
        else:
            assert row[3] == "–"


# -- advice, hints and notes ----------------------------------------------------------------------


def test_smaller_microbatches_are_advised_where_they_would_fit() -> None:
    options = (
        (Option(1.0, static_bytes=3 * 2**20, stash_bytes=2**22, transient_bytes=2**23),),
        (Option(1.0, static_bytes=2**20, stash_bytes=2**24),),
    )
    shared = Kept(2**20, ((0, None), (1, None)), per_microbatch=False)
    budget = (5.5 * 2**20, 13 * 2**20)
    problem = Problem(options, ((0, 1),), 2, kept=(shared,), budget_bytes=budget, min_units=1)
    nearest = solution_of(problem, (0, 1), (0, 0), "dynamic")
    said = " ".join(advice(problem, nearest, CompileOptions(n_stages=2), 8))
    assert "microbatches of 1/8 the rows would fit: raise microbatches= 8-fold" in said
    assert said.endswith("give it more than memory=5.5 MiB")


@pytest.mark.parametrize(
    ("most", "closing", "faster"), [(2, "36.4%", "1.45"), (4, "23.5%", "1.88")]
)
def test_hints_grow_no_further_than_their_limit(
    monkeypatch: pytest.MonkeyPatch, most: int, closing: str, faster: str
) -> None:
    """One microbatch takes 2 s and each more 1.5 s, the optimizer 2 s; rows are of all replicas."""
    monkeypatch.setattr(hints, "MOST_GROWTH", most)
    monkeypatch.setattr(hints, "WIDE_BUBBLE", 0.01)
    plan, timeline = hand_made()
    short = replace(timeline, ranks=tuple(row[:2] for row in timeline.ranks), closing_s=(0.0, 2.0))
    plan = replace(plan, microbatches=1, dp=3, budget_bytes=None, step_s=short.step_s)
    about = hints.Subject(plan, short, CPU.with_link(1e15, 0.0))
    (line,) = (x for x in hints.hints(about) if x.startswith("--microbatches"))
    assert line == (
        f"--microbatches {most} of the same size (a batch of {6 * most} rows instead of 6): "
        f"gradient exchange and optimizer would take {closing} of the step instead of 50.0%, "
        f"{faster} × the rows per second"
    )


def test_notes_count_what_passes_did() -> None:
    pipe = pipecompile.compile(
        models.Residual(4), 2, microbatches=3, example_batch=torch.ones(6, 8)
    )
    notes, programs, plan = dict(pipe.plan.notes), pipe.programs, pipe.plan
    sent = [value for message in programs.messages for value in message.values]
    assert notes["lower"] == f"{len(sent)} boundary values in {len(programs.messages)} messages"
    assert notes["capture"].endswith(", 8 parameters")
    assert notes["partition"].startswith(f"{sum(s.units for s in plan.stages)} units, proven best")
    assert notes["schedule"] == "1f1b, 3 microbatches"
    nodes = [
        node
        for stage in programs.stages
        for part in stage.parts.values()
        for node in part.module.graph.nodes
    ]
    overwriting = sum(overwritten(node) is not None for node in nodes)
    assert notes["inplace"].startswith(f"{overwriting} of ")
    peaks = [stage.memory.peak for stage in plan.stages]
    found = re.fullmatch(rf"at most ({NUMBER} (?:KiB|MiB)), in (\d)B\d", notes["memory"])
    assert found is not None
    assert close(found[1], max(peaks))
    assert int(found[2]) == peaks.index(max(peaks))
    assert plan.param_count == 4 * (64 + 8)
    assert math.isclose(plan.bubble, pipe.compiled.timeline.bubble)

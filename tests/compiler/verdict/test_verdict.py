"""The sentence that a report begins with is true of the plan below it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from pipecompile.compiler.cli import inspection
from pipecompile.compiler.driver.auto import Way
from pipecompile.compiler.ir.actions import Kind, Phase, from_text, to_text
from pipecompile.compiler.ir.program import Message
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.plan.plan import Plan
from pipecompile.compiler.search.neighbours import neighbours_of
from pipecompile.compiler.verdict.limits import limits_of
from pipecompile.compiler.verdict.verdict import Change, Judged, mfu_of, verdict_of
from pipecompile.passes.schedule.communication import add_communication
from pipecompile.passes.schedule.forward_only import forward_only
from pipecompile.passes.schedule.registry import SCHEDULES
from pipecompile.passes.schedule.simulate import Timeline, simulate
from support.commands import SMALL_GPT2, inspect, plan_of
from support.plans import hand_made

GIB = 2**30


def planned() -> tuple[Plan, Timeline]:
    """The plan that was made by hand, with actions."""
    plan, timeline = hand_made()
    lines = tuple(" ".join(str(x.action) for x in row) for row in timeline.ranks)
    return replace(plan, schedule=lines), timeline


def judged(budget: int | None = 8 * GIB, change: Change | None = None) -> tuple[str, ...]:
    plan, timeline = planned()
    plan = replace(plan, budget_bytes=budget)
    return verdict_of(Judged(plan, plan, timeline, plan.step_s / 2, 1e13, change))


def test_how_it_fits() -> None:
    (said,) = judged()
    assert said.startswith("Fits, with 2.00 GiB to spare on stage 0, the fullest, of 8.00 GiB; ")
    assert judged(None)[0].startswith("Needs 6.00 GiB at most, on stage 0 (no limit was given); ")
    (said,) = judged(5 * GIB)
    assert said.startswith("Does not fit: stage 0 takes 6.00 GiB of 5.00 GiB; ")


@pytest.mark.parametrize(("budget", "warned"), [(6.5, True), (6.7, False), (6.0, True)])
def test_a_warning_above_nine_tenths(budget: float, warned: bool) -> None:
    _, *warnings = judged(round(budget * GIB))
    assert bool(warnings) == warned
    if warned:
        assert f"{6 / budget:.0%} of the memory" in warnings[0]
        assert f"--memory {0.9 * budget:.2f}GiB" in warnings[0]


def test_speed_and_mfu() -> None:
    plan, _ = planned()
    (said,) = judged()
    rows = 60 / plan.step_s
    assert f"{rows:.3g} rows/s measured ({2 * rows:.3g} is the bound)" in said
    flops = 30 * 2 * (2e12 + 4e12)  # what is recomputed does not count
    assert mfu_of(plan, plan.step_s, 1e13) == pytest.approx(flops / (plan.step_s * 2 * 1e13))


def test_limits_add_up_to_the_step() -> None:
    plan, timeline = planned()
    limits = limits_of(plan, timeline)
    assert sum(each.share for each in limits) == pytest.approx(1)
    shares = {each.name: each.share for each in limits}
    whole = timeline.step_s
    busy = timeline.busy_s(0)
    assert shares["recomputation for memory on stage 0"] == pytest.approx(busy / 12 / whole)
    assert shares["the optimizer"] == pytest.approx(0.25 / whole)
    assert limits[0].name == "computing on stage 0"


def test_slow_links_are_what_limits() -> None:
    plan, _ = planned()
    kind = SCHEDULES["1f1b"]
    messages = [Message(0, 1, Phase.FORWARD, ()), Message(1, 0, Phase.BACKWARD, ())]
    schedule = add_communication(kind.order(kind.shape(2, 4)), messages)
    compute_s = {(s, k): 1.0 for s in (0, 1) for k in (Kind.F, Kind.B)}
    slow = simulate(from_text(to_text(schedule)), compute_s, {(0, 1): 9.0, (1, 0): 9.0}, (0.5, 0.5))
    plan = replace(plan, schedule=tuple(to_text(schedule).splitlines()), microbatches=4)
    first = limits_of(plan, slow)[0]
    assert first.name == "links between stages"
    fast = simulate(schedule, compute_s, {}, (0.5, 0.5))
    assert first.share == pytest.approx(1 - fast.step_s / slow.step_s)


def test_the_change() -> None:
    (said,) = judged(change=Change("--schedule zb_h1", 30.0, 40.0))
    assert said.endswith(
        "most would help --schedule zb_h1: 30.00 s instead of 40.00 s per step, 25% less."
    )
    plan, timeline = planned()
    bound = replace(plan, costs="roofline")
    change = Change("--schedule zb_h1", 30.0, 40.0)
    (said,) = verdict_of(Judged(bound, plan, timeline, plan.step_s / 2, 1e13, change))
    assert "instead of 40.00 s per step at peak rates, 25% less." in said
    assert "no single change that was tried would help much" in judged()[0]


def inferring(plan: Plan, timeline: Timeline) -> tuple[Plan, Timeline]:
    """The plan and its step without backwards, gradients and optimizer."""
    kind = SCHEDULES["1f1b"]
    shape = kind.shape(2, 4)
    schedule = add_communication(forward_only(shape), [Message(0, 1, Phase.FORWARD, ())])
    forwards = simulate(schedule, {(0, Kind.F): 1.0, (1, Kind.F): 2.0}, {(0, 1): 0.5})
    stages = tuple(
        replace(s, backward_s=0.0, recompute_s=0.0, backward_flops=0, recompute_flops=0)
        for s in plan.stages
    )
    options = {**plan.options, "training": "False"}
    lines = tuple(to_text(schedule).splitlines())
    made = replace(plan, stages=stages, options=options, schedule=lines, microbatches=4)
    return replace(made, step_s=forwards.step_s), forwards


def test_of_forwards_alone() -> None:
    """Nothing is said of steps, gradients or optimizers; MFU counts forwards."""
    plan, timeline = inferring(*planned())
    change = Change("--microbatches 8", 30.0, 40.0)
    (said,) = verdict_of(Judged(plan, plan, timeline, plan.step_s / 2, 1e13, change))
    assert "rows/s of forwards alone measured" in said
    assert "% of the forward)" in said
    assert said.endswith("instead of 40.00 s per batch, 25% less.")
    assert not any(word in said for word in ("step", "gradient", "optimizer", "recomputation"))
    limits = limits_of(plan, timeline)
    names = {"computing on stage 1", "the bubble", "links between stages"}
    assert {each.name for each in limits} == names
    assert sum(each.share for each in limits) == pytest.approx(1)
    flops = plan.microbatches * plan.dp * sum(s.forward_flops for s in plan.stages)
    could = plan.step_s * plan.n_stages * plan.dp * 1e13
    assert mfu_of(plan, plan.step_s, 1e13) == pytest.approx(flops / could)


def test_what_is_tried_of_inference_is_what_it_has() -> None:
    """No schedule and no level of ZeRO: flags that would be refused."""
    plan, _ = planned()
    way = Way(2, 2, "1f1b", zero=0, microbatches=4)
    flags = {near.flags for near in neighbours_of(way, plan, replicas_differ=True)}
    assert {"--schedule zb_h1", "--zero 1"} < flags
    forwards = replace(plan, options={**plan.options, "training": "False"})
    flags = {near.flags for near in neighbours_of(way, forwards, replicas_differ=True)}
    assert {"--stages 1 --dp 4 --microbatches 2", "--stages 4 --microbatches 8"} <= flags
    assert not any("schedule" in each or "zero" in each for each in flags)


def test_inspect_begins_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{SMALL_GPT2} --stages 2 --memory 3.2MiB --device h100"
    report = inspect(command, capsys)
    said = " ".join(report.partition("\n\n")[0].split())
    plan = plan_of(command, capsys)
    peak = max(stage["memory"]["peak"] for stage in plan["stages"])
    spare = re.match(r"Fits, with ([\d.]+) KiB to spare", said)
    assert spare is not None
    assert float(spare[1]) == pytest.approx((plan["budget_bytes"] - peak) / 1024, abs=0.06)
    tokens = re.search(r"([\d,]+) tokens/s calibrated \(([\d,]+) is the bound\)", said)
    assert tokens is not None
    slow, fast = (float(each.replace(",", "")) for each in tokens.groups())
    bound = plan["microbatches"] * plan["microbatch_tokens"] / plan["step_s"]
    assert fast == pytest.approx(bound, rel=6e-3)
    assert slow < fast


@pytest.mark.slow
def test_the_bound_does_not_depend_on_the_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """But for stages that are divided otherwise."""
    found = []
    for costs in ("roofline", "calibrated"):
        command = f"{SMALL_GPT2} --stages 2 --device h100 --costs {costs}"
        said = inspect(command, capsys).partition("\n\n")[0]
        bound = re.search(r"([\d,]+)\s+is\s+the\s+bound", said)
        assert bound is not None
        found.append(float(bound[1].replace(",", "")))
    assert found[0] == pytest.approx(found[1], rel=0.05)


@pytest.mark.slow
def test_the_change_is_one_that_plans_show(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With links this slow, replicas that exchange gradients once are better than stages."""
    limits, searched = [], inspection._Asked.searched

    def noting(asked: Any, options: CompileOptions, *rest: Any) -> Any:
        limits.append(options.time_limit_s)
        return searched(asked, options, *rest)

    monkeypatch.setattr(inspection._Asked, "searched", noting)
    command = f"{SMALL_GPT2} --stages 2 --microbatches 2 --set link.bytes_per_s=20MB --device h100"
    said = " ".join(inspect(command, capsys).partition("\n\n")[0].split())
    assert limits == [inspection.BRIEFLY_S] * 2  # not searched for as long as a plan
    change = re.search(r"most would help (--.*?): .*?, (\d+)% less", said)
    assert change is not None, said
    plan = plan_of(command, capsys)
    rows = f"--batch {plan['microbatches'] * plan['microbatch_rows'] * plan['dp']}"
    base = command.replace("--stages 2 --microbatches 2", rows)
    given = change[1] if "--stages" in change[1] else f"--stages 2 {change[1]}"
    given += "" if "--microbatches" in given else " --microbatches 2"
    other = plan_of(f"{base} {given}", capsys)
    assert 1 - other["step_s"] / plan["step_s"] == pytest.approx(int(change[2]) / 100, abs=0.006)


@pytest.mark.slow
def test_the_change_of_a_forward_is_one_that_plans_show(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"{SMALL_GPT2} --stages 2 --dp 2 --training false --set link.bytes_per_s=20MB"
    command += " --device h100 --batch 8"
    said = " ".join(inspect(f"{command} --microbatches 4", capsys).partition("\n\n")[0].split())
    change = re.search(r"most would help (--stages.*?): .*?, (\d+)% less", said)
    assert change is not None, said
    plan = plan_of(f"{command} --microbatches 4", capsys)
    bound = re.search(r"\(([\d,]+) is the bound\)", said)
    assert bound is not None
    tokens = float(bound[1].replace(",", ""))
    assert tokens == pytest.approx(8 * 32 / plan["step_s"], rel=6e-3)
    other = plan_of(f"{command.replace('--stages 2 --dp 2', change[1])}", capsys)
    assert 1 - other["step_s"] / plan["step_s"] == pytest.approx(int(change[2]) / 100, abs=0.006)

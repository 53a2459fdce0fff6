"""Two kinds of devices in one pipeline: which layers, and which rank, each gets."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from pipecompile.compiler.capture.batch import BatchSpec, flatten
from pipecompile.compiler.capture.skeleton import Skeleton, skeleton_of
from pipecompile.compiler.costs.cluster import Cluster, parse_hardware
from pipecompile.compiler.costs.cost import total_cost
from pipecompile.compiler.costs.hardware import A100, L4, Device
from pipecompile.compiler.costs.reserved import NOTHING
from pipecompile.compiler.costs.topology import Topology
from pipecompile.compiler.driver.builder import Builder
from pipecompile.compiler.driver.capturing import Shared
from pipecompile.compiler.driver.compiled import Compiled, Mode
from pipecompile.compiler.ir.errors import MemoryBudgetError, OptionError, PlanError
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.plan.plan import Plan
from pipecompile.compiler.planning import orders
from pipecompile.compiler.planning.planner import Planner
from pipecompile.compiler.planning.refine import LEAST_GAIN
from pipecompile.compiler.planning.target import Target
from pipecompile.compiler.tensors.fakes import weightless
from pipecompile.compiler.units.pricing import repriced, roofline

HOST = torch.device("cpu")
GIB = 2**30
LAYERS, M = 6, 8


@cache
def subject() -> tuple[Skeleton, BatchSpec, Shared]:
    """A small Llama in bf16, large enough that products count."""
    config = hf.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        vocab_size=8192,
        max_position_embeddings=512,
        use_cache=False,
    )
    with weightless():
        ids = torch.zeros(1, 512, dtype=torch.long)
        spec = flatten({"input_ids": ids, "labels": ids})[1]
        skeleton = skeleton_of(hf.LlamaForCausalLM(config), HOST, options(2).dtypes)
    return skeleton, spec, Shared()


def options(n_stages: int, **more: Any) -> CompileOptions:
    adamw = torch.optim.AdamW
    return CompileOptions(n_stages=n_stages, optimizer=adamw, precision="bf16", **more)


def built(device: Device, n_stages: int, budget: float | None = None, **more: Any) -> Compiled:
    skeleton, spec, shared = subject()
    target = Target(HOST, device, budget or device.memory_bytes, whole=budget is None)
    builder = Builder(skeleton, options(n_stages, **more), target, captured=shared)
    return builder.build(Mode.TRAIN, spec, M)


def layers(plan: Plan) -> list[int]:
    """Operators of layers are alike, so units tell how many each stage has."""
    return [stage.units for stage in plan.stages]


def test_the_slow_device_gets_fewer_layers() -> None:
    """A100s multiply at 2.6 times the rate of an L4 in bf16, and read at 6.8 times its rate."""
    plan = built(parse_hardware("a100:1,l4:1"), 2).plan
    by_device = {stage.device: stage for stage in plan.stages}
    assert by_device.keys() == {"a100", "l4"}
    assert by_device["l4"].forward_flops < 0.6 * by_device["a100"].forward_flops
    assert by_device["l4"].budget_bytes == L4.memory_bytes
    assert by_device["a100"].budget_bytes == A100.memory_bytes
    assert plan.decision.devices == tuple(stage.device for stage in plan.stages)
    note = dict(plan.notes)["devices"]
    assert note.startswith(f"ranks on 1 × {plan.stages[0].device}, 1 × {plan.stages[1].device}")
    assert Plan.from_json(plan.to_json()) == plan
    alike = built(parse_hardware("a100:2"), 2).plan
    assert plan.step_s > alike.step_s
    even = [stage.forward_flops for stage in alike.stages]
    assert max(even) < 1.4 * min(even)


def test_a_stage_takes_what_its_device_takes() -> None:
    made = built(parse_hardware("a100:1,l4:1"), 2)
    _, _, shared = subject()
    (captured, _), *_ = shared.graphs.values()
    parts = shared.parts(captured.graph, shared.locality(captured.graph), A100, "auto", False)
    for stage in made.plan.stages:
        device = {"a100": A100, "l4": L4}[stage.device]
        mine = [
            body
            for body, s in zip(parts.bodies, made.plan.decision.unit_stage, strict=True)
            if s == stage.stage
        ]
        forward = sum(total_cost(body.forward, device).seconds for body in mine)
        assert stage.forward_s == pytest.approx(forward, rel=1e-9)


def planner_of(device: Device, n_stages: int, order: tuple[str, ...]) -> Planner:
    skeleton, spec, shared = subject()
    given = options(n_stages)
    outline = Builder(skeleton, given, Target(HOST, device), captured=shared).outline(spec, M)
    rates = outline.settings.rates.along(order)
    known = outline.graph, outline.locality, given, rates, outline.held_bytes, M, outline.rows
    stepping = outline.settings.footprint.stepping_bytes(outline.graph.copies)
    return Planner(*known, float("inf"), {}, outline.parts, stepping_bytes=stepping)


@pytest.mark.parametrize("topology", [None, Topology(1, 1e9, 1e-5), Topology(1, 2e8, 1e-4)])
def test_the_plan_is_the_best_of_all_cuts_in_all_orders(topology: Topology | None) -> None:
    """As they are simulated; without a limit of memory nothing is recomputed."""
    device = Cluster((("a100", 1), ("l4", 2)), topology).whole
    plan = built(device, 3, float("inf")).plan
    steps: dict[tuple[object, ...], float] = {}
    for order in sorted(set(itertools.permutations(("a100", "l4", "l4")))):
        planner = planner_of(device, 3, order)
        prices = roofline(planner.bodies, planner.menus)
        problem = planner.problem(prices)
        model, n = planner.step_model(problem, prices), problem.n_units
        for a, b in itertools.combinations(range(1, n), 2):
            stage = (0,) * a + (1,) * (b - a) + (2,) * (n - b)
            steps[order, stage] = model.step_s(stage, (0,) * n)
    best = min(steps, key=steps.__getitem__)
    taken = plan.decision.devices, plan.decision.unit_stage
    assert steps[taken] <= steps[best] * (1 + 2 * LEAST_GAIN)
    others = {order for order, _ in steps} - {plan.decision.devices}
    assert all(min(s for (o, _), s in steps.items() if o == other) > 0 for other in others)


def test_prices_of_the_kind_that_units_are_made_for_are_theirs() -> None:
    planner = planner_of(parse_hardware("a100:1,l4:1"), 2, ("a100", "l4"))
    own = roofline(planner.bodies, planner.menus)
    for found, known in zip(repriced(planner.bodies, planner.menus, A100), own, strict=True):
        assert found.forward_s == pytest.approx(known.forward_s, rel=1e-12)
        assert found.backward_s == pytest.approx(known.backward_s, rel=1e-12)
        assert found.recompute_s == pytest.approx(known.recompute_s, rel=1e-12, abs=1e-15)


@pytest.mark.slow
def test_memory_is_that_of_each_device() -> None:
    """The small device is full, and what it cannot hold is recomputed there or moved away."""
    small = {"name": "small", "memory_bytes": int(0.62 * GIB), "reserved": NOTHING}
    fast = Device(**{**vars(A100), **small})
    device = Cluster(((fast, 1), ("a100", 1))).whole
    plan = built(device, 2).plan
    held = {stage.device: stage.memory.needed for stage in plan.stages}
    assert held["small"] <= small["memory_bytes"] < held["a100"]
    assert plan.budget_bytes == small["memory_bytes"]
    assert plan.limit_of(plan.fullest) == small["memory_bytes"]
    nothing = Device(**{**vars(A100), **small, "memory_bytes": GIB // 64})
    with pytest.raises(MemoryBudgetError, match=r"of 16\.0 MiB"):
        built(Cluster(((nothing, 1), ("a100", 1))).whole, 2)


def test_all_else_stays_where_devices_are_counted_and_alike() -> None:
    counted, plain = (built(each, 2).plan for each in (parse_hardware("a100:2"), A100))
    assert counted.decision.unit_stage == plain.decision.unit_stage
    assert counted.step_s == plain.step_s
    assert [stage.device for stage in counted.stages] == ["a100", "a100"]
    assert [stage.device for stage in plain.stages] == ["", ""]


def test_a_plan_has_its_order_and_no_other_devices() -> None:
    device = parse_hardware("a100:1,l4:1")
    plan = built(device, 2).plan
    again = built(device, 2, plan=plan).plan
    assert again.decision == plan.decision
    assert again.step_s == pytest.approx(plan.step_s)
    with pytest.raises((OptionError, PlanError), match=r"make a new plan"):
        built(parse_hardware("a100:2"), 2, plan=plan)


def test_one_slow_link_between_machines_is_enough() -> None:
    slow = Topology(devices=2, bytes_per_s=2e7, latency_s=1e-4)
    plan = built(Cluster((("a100", 2), ("l4", 2)), slow).whole, 4, float("inf")).plan
    assert len(list(itertools.groupby(plan.decision.devices))) == 2
    assert "of 6 orders; a step on" in dict(plan.notes)["devices"]


def test_orders_whose_bound_is_too_high_are_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage holds most microbatches, which is nothing for a device with little memory."""
    own = {"name": "small", "memory_bytes": int(0.4 * GIB), "reserved": NOTHING}
    small = Device(**{**vars(A100), **own})
    cluster = Cluster(((small, 1), ("a100", 2)))
    plan = built(cluster.whole, 3).plan
    assert plan.decision.devices[0] != "small"
    assert "of 3 orders" in dict(plan.notes)["devices"]
    monkeypatch.setattr(orders, "DIVIDED", 1)
    again = built(cluster.whole, 3).plan
    assert again.decision.devices == plan.decision.devices
    assert "the best of 1 that were divided of 3 orders" in dict(again.notes)["devices"]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["interleaved", "zb_h1"])
def test_every_schedule_knows_its_devices(schedule: str) -> None:
    plan = built(parse_hardware("a100:1,l4:1"), 2, schedule=schedule).plan
    flops = {"a100": 0, "l4": 0}
    for stage in plan.stages:
        assert stage.device == plan.decision.devices[stage.rank]
        flops[stage.device] += stage.forward_flops
    assert flops["l4"] < 0.6 * flops["a100"]

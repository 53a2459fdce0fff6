"""Recomputation: fewer bytes, the same bits, nothing computed more often than twice."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.capture import batch as batches
from pipecompile.compiler.capture.capture import capture_training
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.costs.hardware import CPU, H100
from pipecompile.compiler.ir.errors import MemoryBudgetError
from pipecompile.compiler.ir.graph import JointGraph, is_random, phase_of, root_bytes, viewed
from pipecompile.compiler.ir.locality import Locality, locality_of
from pipecompile.compiler.units.menus import options_of
from pipecompile.compiler.units.stash import Body, Stash, bodies_of
from pipecompile.compiler.units.units import units_of
from pipecompile.passes.attention.restore import restore_attention
from pipecompile.passes.graph.placement import place
from pipecompile.passes.graph.remat import rematerialise
from pipecompile.passes.programs.lower import lower
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly
from torch import fx

DEVICE = torch.device("cpu")
STEPS = 3

FULLY = [
    ("llama", 3, 1, 5, "1f1b"),
    ("bert-mlm", 4, 1, 5, "zb_h1"),
    ("bart", 3, 2, 2, "1f1b"),
    ("mixtral", 2, 1, 2, "1f1b"),
    ("gpt2", 2, 1, 2, "zb_h1"),
    ("bert-classifier", 2, 1, 2, "1f1b"),
    ("t5", 4, 1, 5, "zb_h1"),
    ("vit", 1, 1, 2, "1f1b"),
]

expected = cache(jobs.train_plainly)


def train(name: str, n_stages: int, dp: int, microbatches: int, **options: Any) -> plain.Trained:
    pipe = jobs.pipeline(name, n_stages, dp, microbatches, **options)
    return plain.train_pipeline(pipe, models.batches(name, 2 * dp * microbatches, STEPS))


@pytest.mark.parametrize(
    ("name", "n_stages", "dp", "microbatches", "schedule"),
    quickly(FULLY[:2], FULLY),
)
def test_full_recomputation_changes_no_bit(
    name: str, n_stages: int, dp: int, microbatches: int, schedule: str
) -> None:
    found = train(name, n_stages, dp, microbatches, remat="full", schedule=schedule)
    plain.assert_equal(found, expected(name, dp, microbatches, "adamw", STEPS))


@pytest.mark.parametrize(
    ("name", "n_stages"), quickly([("gpt2", 4)], [("llama", 2), ("t5", 3), ("gpt2", 4)])
)
def test_a_tight_budget_changes_no_bit_and_is_kept(name: str, n_stages: int) -> None:
    spec = models.batches(name, 8, 1)[0]
    loose = jobs.pipeline(name, n_stages, 1, 4, remat="none", example_batch=spec)
    peak = max(stage.memory.peak for stage in loose.plan.stages)
    fixed = max(
        stage.memory.peak - stage.in_flight * stage.stash_bytes for stage in loose.plan.stages
    )
    budget = (peak + fixed) // 2
    with pytest.raises(MemoryBudgetError, match=r"stage \d needs .* too much: use remat"):
        jobs.pipeline(name, n_stages, 1, 4, remat="none", memory=budget, example_batch=spec)
    pipe = jobs.pipeline(name, n_stages, 1, 4, memory=budget)
    found = plain.train_pipeline(pipe, models.batches(name, 8, STEPS))
    plain.assert_equal(found, expected(name, 1, 4, "adamw", STEPS))
    assert pipe.plan.decision.recomputed
    assert max(stage.memory.peak for stage in pipe.plan.stages) <= budget


@pytest.mark.slow
def test_processes_recompute_alike(gang: Any) -> None:
    several: Gang = gang(2)
    for found in several.run(train_fully, "llama", 2, 1, 5):
        plain.assert_equal(found, expected("llama", 1, 5, "adamw", STEPS), whole=False)


def train_fully(*shape: Any) -> plain.Trained:
    return train(*shape, remat="full")


def test_dropout_is_drawn_once() -> None:
    """With and without recomputation, the same masks."""
    torch.manual_seed(0)
    model = models.gpt2(dropout=0.3, n_layer=1)
    batch = models.batches("gpt2", 8, 1)[0]
    grads = []
    for remat in ("none", "full"):
        pipe = pipecompile.compile(model, 2, microbatches=4, remat=remat, seed=7)
        pipe.forward_backward(batch)
        grads.append({name: p.grad for name, p in pipe.named_parameters()})
    assert bool(pipe.plan.decision.recomputed)
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", quickly(["gpt2"], ["gpt2", "llama"]))
def test_other_shapes_recompute_the_same(name: str) -> None:
    pipe = pipecompile.compile(models.build(name), 2, microbatches=2, remat="full")
    counts = []
    for length in (12, 7):
        batch = models.tokens(4, length)
        pipe.forward_backward(batch)
        counts.append(len(pipe.compile_for(batch).decision.recomputed))
    assert counts[0] == counts[1] > 20


# -- the pass, and the choices ----------------------------------------------------------------


@cache
def captured(name: str) -> JointGraph:
    torch.manual_seed(0)
    build, batch = models.MODELS[name]
    skeleton, spec = skeleton_of(build(), DEVICE), batches.flatten(batch(2))[1]
    return capture_training(skeleton, spec, None, DEVICE, (restore_attention,)).graph


def divided(name: str) -> tuple[JointGraph, Locality, list[Body], dict[fx.Node, int]]:
    """A graph to change, and its units."""
    graph, _ = captured(name).copy()
    locality = locality_of(graph)
    return graph, locality, *bodies_of(graph, locality, units_of(graph, locality, H100))


@pytest.mark.parametrize("name", quickly(["gpt2"], sorted(models.MODELS)))
def test_the_first_choice_keeps_everything_and_the_others_ever_less(name: str) -> None:
    _, _, bodies, places = divided(name)
    for menu in options_of(bodies, places, H100):
        assert not menu[0].recomputed
        seconds = [stash.recompute_s for stash in menu]
        assert seconds == sorted(seconds)
        for stash in menu:
            assert not any(is_random(node) for node in stash.recomputed)
            assert not stash.recomputed & stash.exclusive


@pytest.mark.parametrize("name", quickly(["gpt2"], sorted(models.MODELS)))
def test_fusions_keep_less_and_compute_elementwise_operators_again(name: str) -> None:
    """Which is not counted as recomputation; what a library's kernel makes is never made twice."""
    _, _, bodies, places = divided(name)
    whole = options_of(bodies, places, H100, "none")
    fused = options_of(bodies, places, H100, fuses=True)
    for menu, (all_,) in zip(fused, whole, strict=True):
        first = menu[0]
        assert first.recompute_s == 0
        assert first.stash_bytes + root_bytes(first.shared) <= all_.stash_bytes + root_bytes(
            all_.shared
        )
        for node in first.recomputed:
            tags = getattr(node.target, "tags", ())
            cast = node.target is torch.ops.aten._to_copy.default
            assert torch.Tag.pointwise in tags or viewed(node) is not None or cast
            assert not is_random(node)
        seconds = [stash.recompute_s for stash in menu]
        assert seconds == sorted(seconds)
    kept = sum(menu[0].stash_bytes for menu in fused)
    assert kept < 0.9 * sum(menu[0].stash_bytes for menu in whole)


@pytest.mark.parametrize("name", quickly(["gpt2"], ["gpt2", "llama", "bart", "t5", "mixtral"]))
@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("which", quickly([-1], [0, -1]))
def test_a_choice_stashes_what_it_says(name: str, which: int, fuses: bool) -> None:
    """Every unit as a stage of its own: what its program keeps is what the choice announced."""
    graph, locality, bodies, places = divided(name)
    every = options_of(bodies, places, CPU, fuses=fuses)
    menus = [[s for s in menu if not s.forgets] for menu in every]
    chosen = [menu[which] for menu in menus]
    home = {node: body.unit.index for body in bodies for node in body.forward}
    again = {node for stash in chosen for node in stash.recomputed}
    remat = rematerialise(graph, locality, place(graph, locality, home).stage, again)
    program = lower(graph, remat.locality, remat.stage, len(bodies))
    for stage, stash in zip(program.stages, chosen, strict=True):
        announced = _announced(stash, bodies[stage.stage])
        assert stage.stash_bytes >= announced
        free = stage.stash_bytes - announced  # masks and the like, which are nobody's choice
        assert free <= 2 * 12 * 12 * 4 * 4, (name, stage.stage)


def _announced(stash: Stash, body: Body) -> int:
    return stash.stash_bytes + root_bytes(stash.shared)


def test_each_value_is_recomputed_once_right_before_its_first_reader() -> None:
    graph, locality, bodies, places = divided("llama")
    text = str(graph.graph)
    own, twin = graph.copy()
    home = {twin[node]: body.unit.index // 4 for body in bodies for node in body.forward}
    again = {twin[n] for menu in options_of(bodies, places, CPU) for n in menu[-1].recomputed}
    here = locality.moved(twin)
    remat = rematerialise(own, here, place(own, here, home).stage, again)
    assert remat.copies
    assert max(Counter(remat.copies.values()).values()) == 1
    nodes = list(own.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    for copy, node in remat.copies.items():
        assert phase_of(copy) != phase_of(node)
        first = min(order[user] for user in copy.users)
        between = nodes[order[copy] + 1 : first]
        assert all(other in remat.copies for other in between)
    own.graph.lint()
    assert str(graph.graph) == text

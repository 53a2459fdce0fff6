"""Capture and graph passes: what the joint graph and the programs look like."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.capture import batch as batches
from pipecompile.compiler.capture import capture
from pipecompile.compiler.capture.capture import capture_training
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.costs.hardware import CPU
from pipecompile.compiler.ir.errors import VerificationError
from pipecompile.compiler.ir.graph import JointGraph, Phase, phase_of, storage_root, viewed
from pipecompile.compiler.ir.locality import locality_of
from pipecompile.compiler.tensors.fakes import weightless
from pipecompile.compiler.tracing.kept import UNTRACED
from pipecompile.compiler.units import units
from pipecompile.compiler.units.units import crossing_bytes, units_of
from pipecompile.passes.attention import restore as attention
from pipecompile.passes.attention.restore import restore_attention
from pipecompile.passes.graph.joins import copy_where_nothing_is_joined
from pipecompile.passes.graph.verify import verify_graph, verify_placement
from support import jobs, models, plain
from support.matrix import quickly
from torch import nn

DEVICE = torch.device("cpu")


def captured(name: str) -> JointGraph:
    spec = batches.flatten(models.batches(name, 2, 1)[0])[1]
    skeleton = skeleton_of(models.build(name), DEVICE)
    return capture_training(skeleton, spec, None, DEVICE).graph


known = cache(captured)
"""The same for those who change nothing."""


def calls(graph: JointGraph, part: str) -> list[Any]:
    return [node for node in graph.ops() if part in str(node.target)]


@pytest.mark.parametrize("name", quickly(["gpt2"], models.MODELS))
def test_joint_graphs_are_legal_and_complete(name: str) -> None:
    graph, model = known(name), models.build(name)
    verify_graph(graph)
    assert set(graph.params) == {n for n, _ in model.named_parameters()}
    assert set(graph.grads) <= set(graph.params)
    assert len(graph.grads) >= len(graph.params) - 1  # BERT's pooler may go unread
    assert graph.fingerprint() == captured(name).fingerprint()
    assert not calls(graph, "_assert")
    backward = list(graph.ops(Phase.BACKWARD))
    assert backward
    assert all(node.meta["partner"] is not None for node in backward)


def test_a_verifier_that_can_fail() -> None:
    graph = known("llama").copy()[0]
    forward = next(node for node in graph.ops(Phase.FORWARD) if node.all_input_nodes)
    forward.meta["phase"] = Phase.BACKWARD
    with pytest.raises(VerificationError, match="reads"):
        verify_graph(graph)


def test_placement_must_rise_forward_and_fall_backward() -> None:
    graph = known("llama")
    locality = locality_of(graph)
    stage = dict.fromkeys(locality.staged, 1)
    verify_placement(graph, stage)
    stage[locality.staged[0]] = 2
    with pytest.raises(VerificationError, match="is read by"):
        verify_placement(graph, stage)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that cannot be traced otherwise are told that they are compiled."""
    monkeypatch.setattr(capture, "UNTRACED", UNTRACED[1:])


@pytest.mark.usefixtures("told")
def test_constant_causal_masks_become_a_flag() -> None:
    """Without a cache, transformers looks for packed sequences, and so builds a mask."""
    spec = batches.flatten(models.tokens(2))[1]
    skeleton = skeleton_of(models.gpt2(n_layer=1, use_cache=False), DEVICE)
    with_masks, with_flags = (
        capture_training(skeleton, spec, None, DEVICE, passes).graph
        for passes in ((), (restore_attention,))
    )
    assert calls(with_masks, "cumsum")
    kernels = calls(with_flags, "flash_attention_for_cpu.default")
    assert kernels
    assert all(node.args[4] is True and "attn_mask" not in node.kwargs for node in kernels)


def test_masks_that_the_untraced_model_builds_stay() -> None:
    """A constant is looked at while the model is traced: what it builds all the same, it wants."""
    assert attention_with("causal", TRANSFORMERS) == [None, 0.0, True]
    assert attention_with("causal", TRANSFORMERS, as_untraced=True) == ["mask"]
    spec = batches.flatten(models.tokens(2))[1]
    skeleton = skeleton_of(models.gpt2(n_layer=1, use_cache=False), DEVICE)
    graph = capture_training(skeleton, spec, None, DEVICE).graph
    assert not calls(graph, "cumsum")
    kernels = calls(graph, "flash_attention_for_cpu.default")
    assert all(node.args[4] is True for node in kernels)


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize(("widest", "heads"), [(256, 2), (8, 2), (7, 4)])
def test_repeated_heads_become_grouped_attention(
    monkeypatch: pytest.MonkeyPatch, widest: int, heads: int
) -> None:
    """2 key heads of width 8 for 4 query heads, up to transformers' own limit of the width."""
    monkeypatch.setattr(attention, "MAX_GROUPED_DIM", widest)
    spec = batches.flatten(models.tokens(2))[1]
    skeleton = skeleton_of(models.llama(num_hidden_layers=1, use_cache=False), DEVICE)
    graph = capture_training(skeleton, spec, None, DEVICE, (restore_attention,)).graph
    kernels = calls(graph, "flash_attention_for_cpu.default")
    assert all(node.args[1].meta["val"].shape[1] == heads for node in kernels)


def test_of_a_cache_only_copies_are_left() -> None:
    """Of keys and values, in the layout that attention reads them in untraced; caches are joined
    to nothing in the beginning."""
    made = []
    for cached in (True, False):
        model = models.gpt2(n_layer=1, use_cache=cached)
        spec = batches.flatten(models.tokens(2))[1]
        skeleton = skeleton_of(model, DEVICE)
        passes = (restore_attention, copy_where_nothing_is_joined)
        graph = capture_training(skeleton, spec, None, DEVICE, passes).graph
        made.append(Counter(str(node.target) for node in graph.ops()))
    assert made[0] - made[1] == {"aten.clone.default": 2}
    assert made[0] >= made[1]


class Widened(nn.Module):
    """A projection of two parts, of which one has no elements: MobileBERT's head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.rest = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ torch.cat([self.weight, self.rest])).square().mean()


def test_a_parameter_without_elements_has_its_gradient() -> None:
    pipe = pipecompile.compile(Widened(), 1)
    pipe.forward_backward(torch.randn(2, 4))
    assert [p.grad is not None for p in pipe.parameters()] == [True, True]


def test_masks_made_from_the_batch_stay() -> None:
    """Padding is data: llama's test batch has an attention mask."""
    spec = batches.flatten(models.batches("llama", 2, 1)[0])[1]
    skeleton = skeleton_of(models.llama(num_hidden_layers=1), DEVICE)
    graph = capture_training(skeleton, spec, None, DEVICE, (restore_attention,)).graph
    kernels = calls(graph, "flash_attention_for_cpu.default")
    assert all("attn_mask" in node.kwargs for node in kernels)


def attention_with(kind: str, line: str, as_untraced: bool = False) -> list[Any]:
    """What an attention call has for a mask and a flag after the pass."""

    class Model(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            ones = torch.ones(3, 3)
            hidden = ones.triu(1) == 1
            made = {
                "causal": ~hidden,
                "added": torch.zeros(3, 3).masked_fill(hidden, float("-inf")),
                "all": ones == 1,
                "biased": ones.cumsum(0).masked_fill(hidden, float("-inf")),
                "window": ~hidden & (ones.tril(-2) == 0),
            }
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=made[kind])

    traced = torch.export.export(Model(), (torch.ones(1, 2, 3, 4),)).module(check_guards=False)
    for node in traced.graph.nodes:
        node.meta["stack_trace"] = f'File "model.py", line 1, in forward\n    {line}'
    traced.meta["as_untraced"] = as_untraced
    restore_attention(traced)
    target = torch.ops.aten.scaled_dot_product_attention.default
    (call,) = traced.graph.find_nodes(op="call_function", target=target)
    masks = [x for x in call.args[3:4] if x is not None]
    return ["mask"] if masks else list(call.args[3:])


TRANSFORMERS = "attn_output, attn_weights = attention_interface("


def test_only_exact_masks_are_dropped() -> None:
    assert attention_with("causal", TRANSFORMERS) == [None, 0.0, True]
    assert attention_with("added", TRANSFORMERS) == [None, 0.0, True]
    assert attention_with("all", TRANSFORMERS) == [None, 0.0, False]
    assert attention_with("biased", TRANSFORMERS) == ["mask"]
    assert attention_with("window", TRANSFORMERS) == ["mask"]


def test_masks_too_large_to_look_at_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_ELEMENTS", 9)
    assert attention_with("causal", TRANSFORMERS) == [None, 0.0, True]
    monkeypatch.setattr(attention, "MAX_ELEMENTS", 8)
    assert attention_with("causal", TRANSFORMERS) == ["mask"]


def test_attention_that_transformers_did_not_call_stays() -> None:
    assert attention_with("causal", "y = F.scaled_dot_product_attention(q, q, q, mask)") == ["mask"]


@pytest.mark.slow
def test_long_sequences_have_the_same_bits_as_untraced_attention() -> None:
    """Several blocks of the flash kernel: the flag must not change what it computes."""
    torch.manual_seed(0)
    model = models.llama(num_hidden_layers=1, max_position_embeddings=700)
    batch = models.tokens(2, length=650)
    pipe = jobs.pipecompile.compile(model, 2, microbatches=2, optimizer=jobs.OPTIMIZERS["sgd"])
    found = plain.train_pipeline(pipe, [batch])
    plain.assert_equal(found, plain.train(model, [batch], jobs.OPTIMIZERS["sgd"], 1, 2))


def test_views_share_their_roots_memory() -> None:
    graph = known("llama")
    for node in graph.ops():
        if "aten.view.default" in str(node.target):
            assert viewed(node) is node.args[0]
            assert viewed(storage_root(node)) is None
        if "aten.mm.default" in str(node.target):
            assert storage_root(node) is node


def test_units_end_where_little_crosses() -> None:
    graph = known("llama")
    locality = locality_of(graph)
    made = units_of(graph, locality, CPU)
    nodes = [node for node in locality.staged if phase_of(node) is Phase.FORWARD]
    assert [node for unit in made for node in unit.nodes] == nodes
    hidden = 2 * 12 * 32 * 4  # (rows, length, width) in fp32
    assert [unit.cut_bytes for unit in made].count(hidden) >= 2 * 3  # after attention, after MLP
    assert max(crossing_bytes(nodes)) > hidden
    assert made[-1].cut_bytes == 0


def test_many_layers_make_no_more_units_than_the_limit_and_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(units, "MAX_UNITS", 30)
    spec = batches.flatten(torch.zeros(4, 8))[1]
    skeleton = skeleton_of(models.Residual(40), DEVICE)
    graph = capture_training(skeleton, spec, None, DEVICE).graph
    made = units.units_of(graph, locality_of(graph), CPU)
    assert 20 <= len(made) <= 30
    sizes = [len(unit.nodes) for unit in made[1:-1]]
    assert max(sizes) <= 1.5 * min(sizes)


class Waist(models.Residual):
    """Many alike layers, and one place where less crosses than anywhere else."""

    def __init__(self, layers: int, place: int) -> None:
        super().__init__(layers)
        self.place = place
        self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = self.up(self.down(x)) if i == self.place else x
            x = x + layer(x).tanh()
        return x.square().mean()


@cache
def with_waist(place: int) -> JointGraph:
    skeleton = skeleton_of(Waist(40, place), DEVICE)
    return capture_training(skeleton, batches.flatten(torch.zeros(4, 8))[1], None, DEVICE).graph


@pytest.mark.slow
@pytest.mark.parametrize("place", [1, 17, 39])
def test_one_cheap_cut_leaves_room_for_the_others(
    monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """As before the head of a model in bf16, whose residual stream is in fp32."""
    graph = with_waist(place)
    for limit in (9, 12, 16, 30):
        monkeypatch.setattr(units, "MAX_UNITS", limit)
        made = units.units_of(graph, locality_of(graph), CPU)
        assert limit // 2 <= len(made) <= limit


def test_a_norm_is_not_split() -> None:
    """Between the mean of squares and the rest of an RMS norm little crosses, yet more than
    after the residual sum before it."""
    with weightless():
        model = models.llama(num_hidden_layers=2, hidden_size=512, intermediate_size=1024)
        spec = batches.flatten(models.tokens(2, length=256))[1]
    graph = capture_training(skeleton_of(model, DEVICE), spec, None, DEVICE).graph
    hidden = 2 * 256 * 512 * 4
    made = units_of(graph, locality_of(graph), CPU)
    assert made[0].cut_bytes == hidden
    assert not any(0 < unit.cut_bytes % hidden < hidden // 8 for unit in made)


def test_parameter_names_that_are_no_python_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    pipe = jobs.pipecompile.compile(
        model, 2, loss_fn=lambda out, _: out.mean(), example_batch=torch.ones(2, 4)
    )
    pipe.forward_backward(torch.ones(2, 4))
    assert {n for n, p in pipe.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters()
    }


class Chain(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        pairs = pairwise(widths)
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in pairs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


@pytest.mark.parametrize("widths", [(8, 8, 8, 8, 8), (32, 16, 8, 4, 2), (2, 4, 8, 16, 32)])
def test_chains_are_cut_between_any_products(widths: tuple[int, ...]) -> None:
    """Where values keep their size, or always shrink or grow, no minimum tells where to cut."""
    x = torch.randn(4, widths[0])
    skeleton = skeleton_of(Chain(*widths), DEVICE)
    graph = capture_training(skeleton, batches.flatten(x)[1], None, DEVICE).graph
    made = units_of(graph, locality_of(graph), CPU)
    products = [[n for n in unit.nodes if "mm" in str(n.target)] for unit in made]
    assert [len(each) for each in products if each] == [1] * (len(widths) - 1)

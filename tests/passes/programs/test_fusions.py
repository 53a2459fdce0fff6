"""Runs of operators as one call: the same bits, alike for alike layers, and nothing held on to."""

from __future__ import annotations

import weakref
from collections import Counter
from operator import getitem
from typing import Any

import pipecompile
import pytest
import torch
from hypothesis import given, settings
from pipecompile.compiler.ir import ops
from pipecompile.compiler.ir.graph import overwritten, storage_root
from pipecompile.compiler.ir.program import Role, fusions_of
from pipecompile.passes.programs.fusions import _items_first
from support import jobs, models, plain
from support.drawn import STEPS, Drawn
from support.fused import calls, interpreted, programs
from support.matrix import quickly
from torch import fx, nn


def trained(name: str, *shape: int, **options: Any) -> plain.Trained:
    pipe = jobs.pipeline(name, *shape, **options)
    _, dp, microbatches = shape
    return plain.train_pipeline(pipe, models.batches(name, 2 * dp * microbatches, 2))


CASES: list[tuple[str, tuple[int, int, int], dict[str, Any]]] = [
    ("llama", (2, 1, 2), {"schedule": "zb_h1", "remat": "full"}),
    ("gpt2", (1, 1, 2), {}),
    ("gpt2", (3, 1, 4), {"precision": "bf16", "tied_grads": "per_step"}),
    ("gpt2", (2, 2, 2), {"zero": 3}),
    ("gpt2", (2, 2, 2), {"zero": 3, "precision": "bf16_params", "remat": "full"}),
    ("llama", (2, 2, 2), {"zero": 2, "schedule": "zb_h1"}),
    ("llama", (2, 1, 4), {"schedule": "interleaved"}),
    ("bert-classifier", (2, 1, 2), {"remat": "full"}),
    ("bert-mlm", (2, 2, 2), {"zero": 1}),
    ("bart", (3, 1, 2), {"schedule": "zb_h1"}),
    ("t5", (3, 1, 2), {"remat": "full"}),
    ("mixtral", (2, 1, 2), {}),
    ("mixtral", (2, 2, 2), {"zero": 3}),
    ("vit", (2, 1, 2), {"schedule": "zb_h1", "precision": "bf16"}),
]


@pytest.mark.parametrize(("name", "shape", "options"), quickly(CASES[:1], CASES))
def test_the_split_changes_no_bit(
    name: str, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    """Operators that run as they are, in the order and groups that fusions have."""
    with interpreted():
        found = trained(name, *shape, backend="inductor", **options)
    plain.assert_equal(found, trained(name, *shape, **options))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", quickly(["zb_h1"], ["1f1b", "zb_h1"]))
def test_dropout_keeps_its_masks(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "gpt2", (lambda: models.gpt2(0.2), models.tokens))
    options: dict[str, Any] = {"seed": 3, "schedule": schedule, "remat": "full"}
    with interpreted():
        found = trained("gpt2", 2, 1, 2, backend="inductor", **options)
    plain.assert_equal(found, trained("gpt2", 2, 1, 2, **options))


@pytest.mark.slow
@settings(max_examples=4)
@given(STEPS)
def test_random_programs_keep_their_bits(steps: list[tuple[int, int, int]]) -> None:
    x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))
    model = Drawn(steps)
    with interpreted():
        pipe = pipecompile.compile(model, 1, microbatches=2, example_batch=x, backend="inductor")
        found = pipe.forward_backward(x)
    losses = [model(piece) for piece in x.chunk(2)]
    assert torch.equal(found, torch.stack(losses).mean())
    (sum(losses) / 2).backward()  # type: ignore[union-attr]
    for name, param in pipe.named_parameters():
        torch.testing.assert_close(param.grad, model.get_parameter(name).grad)


def test_arguments_come_first_though_some_have_items() -> None:
    graph = fx.Graph()
    pair, other = graph.placeholder("pair"), graph.placeholder("other")
    item = graph.call_function(getitem, (pair, 0))
    graph.output((item, other))
    assert [node.name for node in _items_first(graph)] == ["pair", "other", "getitem", "output"]


def fused(name: str = "gpt2", n_stages: int = 1, **options: Any) -> Any:
    with interpreted():
        pipe = jobs.pipeline(name, n_stages, 1, 2, backend="inductor", **options)
        pipe.compile_for(models.batches(name, 4, 1)[0])
    return pipe


LAYERS = {"gpt2": "n_layer", "llama": "num_hidden_layers"}


@pytest.mark.parametrize(
    ("name", "layers"), quickly([("gpt2", 3)], [("gpt2", 3), ("gpt2", 12), ("llama", 12)])
)
def test_layers_that_are_alike_are_one_fusion(
    name: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's forward and backward, and those of what stands around the layers."""
    make, batch = models.MODELS[name]
    deep = make(**{LAYERS[name]: layers})  # type: ignore[call-arg]
    monkeypatch.setitem(models.MODELS, name, (lambda: deep, batch))
    pipe = fused(name)
    whole = Counter(call.target for part in programs(pipe).values() for call in calls(part))
    assert sorted(whole.values())[-2:] == [layers, layers]
    assert len(whole) <= 6
    notes = dict(pipe.plan.notes)
    assert notes["fusions"].startswith(f"{whole.total()} fusions, {len(whole)} of them distinct")


def test_a_fusion_lies_in_one_layer_and_says_in_which() -> None:
    for part in programs(fused("gpt2", 2)).values():
        for call in calls(part):
            inside = {node.meta["module"] for node in call.users if node.meta.get("module")}
            layers = {name.split(".")[2] for name in inside if name.startswith("transformer.h.")}
            assert len(layers) <= 1
            if layers:
                assert call.meta["module"].startswith(f"transformer.h.{layers.pop()}")


def test_what_is_ours_or_checks_indices_stays_outside() -> None:
    pipe = fused("gpt2", 1)
    for part in programs(pipe).values():
        for module in fusions_of(part).values():
            targets = {str(node.target) for node in module.graph.nodes}  # type: ignore[union-attr]
            assert not targets & {"aten.embedding.default", "aten.nll_loss_forward.default"}
            assert not any("pipecompile" in target for target in targets)
        assert not [node for node in part.module.graph.nodes if overwritten(node)]
    (stage,) = pipe.programs.stages
    given = [node.args[0].name for node in sums(stage.backward)]
    assert given == [node.args[0].name for node in sums(programs(pipe)["0B"])]


def sums(program: Any) -> list[Any]:
    """What adds to gradients, in order."""
    adding = (ops.accumulate, ops.accumulate_product)
    return [node for node in program.module.graph.nodes if node.target in adding]


def test_other_sizes_and_literals_are_other_fusions() -> None:
    class Odd(nn.Module):
        def __init__(self, *widths: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, width) for width in widths)
            self.powers = [2.0] * len(widths)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = [
                (layer(x).tanh() ** power).mean()
                for layer, power in zip(self.layers, self.powers, strict=True)
            ]
            return sum(made, torch.zeros(()))

    def distinct(model: Odd) -> int:
        with interpreted():
            pipe = pipecompile.compile(
                model, 1, microbatches=1, example_batch=torch.ones(4, 8), backend="inductor"
            )
        return len(fusions_of(programs(pipe)["0F"]))

    alike = distinct(Odd(4, 4, 4, 4))
    assert distinct(Odd(4, 4, 6, 4)) == alike + 1
    model = Odd(4, 4, 4, 4)
    model.powers[2] = 3.0
    assert distinct(model) == alike + 1


def test_an_argument_is_gone_when_a_fusion_lets_go_of_it() -> None:
    """Who calls it holds on to nothing that is not read later: neither program nor executor."""
    gone: list[bool] = []

    class Watching(nn.Module):
        def __init__(self, fusion: Any) -> None:
            super().__init__()
            self.fusion = fusion

        def forward(self, boxed: list[torch.Tensor]) -> Any:
            copies = [tensor.clone() for tensor in boxed]
            given = [weakref.ref(tensor) for tensor in boxed]
            boxed.clear()
            gone.extend(ref() is None for ref in given)
            return self.fusion(copies)

    with interpreted(Watching):
        pipe = jobs.pipeline("gpt2", 1, 1, 2, backend="inductor")
        pipe.forward_backward(models.batches("gpt2", 4, 1)[0])
    held = sum(
        len(call.all_input_nodes) for part in programs(pipe).values() for call in calls(part)
    )
    (stage,) = pipe.programs.stages
    roots = {node.name: storage_root(node).name for node in stage.forward.module.graph.nodes}
    later = {
        (call, node)
        for part in programs(pipe).values()
        for call in calls(part)
        for node in call.all_input_nodes
        if is_kept(part, call, node, roots)
    }
    assert gone.count(True) == 2 * (held - len(later))


def is_kept(program: Any, call: Any, node: Any, roots: dict[str, str]) -> bool:
    """Whether something else reads an argument later, or holds it: parameters and the batch are the
    pipeline's, views of parameters are new objects, and a view that was stashed holds its base.

    Args:
        roots: names of the forward's values -> whose memory they are in.
    """
    ports = dict(zip(program.module.graph.nodes, program.inputs, strict=False))
    if node in ports and ports[node].role is not Role.VALUE:
        return True
    views = [n for n in ports if roots.get(n.name) == node.name]
    return any(max(n.users) > call for n in (node, *views))

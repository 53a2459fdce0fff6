"""Layers whose operators are copied: the graph is that of a model whose every layer was traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.capture import (
    capture_evaluation,
    capture_training,
    function_of,
)
from pipecompile.compiler.capture.exporting import exported, tracing
from pipecompile.compiler.capture.skeleton import Skeleton, skeleton_of
from pipecompile.compiler.ir.graph import tensors
from pipecompile.compiler.tracing import copies, likeness
from torch import fx, nn

HOST = torch.device("cpu")
CLASSES = 32
MODE = {"scale": 1.0}  # what a forward may set and put back


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.zeros((2, 8), dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


class Layer(nn.Module):
    """Has an index, which it reads if ``reads`` says so."""

    def __init__(self, index: int, scale: float = 1.0, drop: float = 0.1, reads: bool = False):
        super().__init__()
        self.index, self.scale, self.reads = index, scale, reads
        self.inner = nn.Linear(8, 8)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor, more: float = 0.0) -> torch.Tensor:
        y: torch.Tensor = self.inner(x.to(torch.float32)) * self.scale * MODE["scale"] + more
        if self.reads and self.index % 2:
            y = torch.relu(y)
        return x + self.drop(y)


class Stack(nn.Module):
    """Args:
    call: (layer, its number, a tensor) -> what the layer makes of it.
    """

    def __init__(self, layers: list[nn.Module], call: Callable[..., Any] | None = None):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 8)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, CLASSES)
        self.call = call or (lambda layer, _, x: layer(x))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            x = self.call(layer, i, x)
        logits = self.head(x).flatten(0, 1)
        return {"loss": nn.functional.cross_entropy(logits, labels.flatten())}


def told(graph: fx.Graph) -> list[object]:
    """All that is to be known of a graph."""
    places: dict[int, int] = {}
    lines: list[object] = []
    for node in graph.nodes:
        values = tensors(node.meta.get("val"))
        memory = [places.setdefault(x.untyped_storage()._cdata, len(places)) for x in values]
        looks = [(tuple(x.shape), x.stride(), x.storage_offset(), x.dtype) for x in values]
        stack = [(key, path) for key, (path, _) in node.meta.get("nn_module_stack", {}).items()]
        own = node.op, node.name, str(node.target), str(node.args), str(node.kwargs)
        lines.append((*own, looks, memory, stack, str(node.meta.get("stack_trace"))))
    return lines


def forward_of(skeleton: Skeleton, batch: Any) -> list[object]:
    _, spec = flatten(batch)
    function, leaves = function_of(skeleton, spec, None, HOST, "loss", None)
    with skeleton.computing(), tracing(), torch.enable_grad():
        return told(exported(function, leaves)[0].graph)


def copied(model: nn.Module, batch: Any = None) -> int:
    """How many layers were copied; the graph is that of all layers traced, and so is the joint one.

    It is compared with names, memory that values share, modules and lines of code.
    """
    batch = batch or tokens()
    skeleton = skeleton_of(model, HOST)
    _, spec = flatten(batch)
    with mock.patch.object(copies, "copied", wraps=copies.copied) as calls:
        graph = forward_of(skeleton, batch)
        count = calls.call_count
        joint = capture_training(skeleton, spec, None, HOST).graph
    with mock.patch.object(likeness, "FEWEST", 10**9):
        assert graph == forward_of(skeleton, batch)
        whole = capture_training(skeleton, spec, None, HOST).graph
    assert joint.text() == whole.text()
    assert joint.fingerprint() == whole.fingerprint()
    meta = [
        [(n.meta.get("phase"), n.meta.get("partner"), n.meta.get("module")) for n in each.ops()]
        for each in (joint, whole)
    ]
    firsts = [[row[1] for row in rows] for rows in meta]
    assert [first.index(x) for first in firsts[:1] for x in first] == [
        first.index(x) for first in firsts[1:] for x in first
    ]
    assert [(a, c) for a, _, c in meta[0]] == [(a, c) for a, _, c in meta[1]]
    return count


def test_layers_that_are_alike_are_traced_once() -> None:
    assert copied(Stack([Layer(i) for i in range(5)])) == 4


def test_layers_that_read_what_differs_are_traced() -> None:
    assert copied(Stack([Layer(i, reads=True) for i in range(5)])) == 0


def test_arguments_tell_layers_apart() -> None:
    def call(layer: nn.Module, i: int, x: torch.Tensor) -> Any:
        return layer(x, float(i // 3))

    assert (
        copied(Stack([Layer(i) for i in range(6)], call)) == 4
    )  # the first and the fourth are not


@pytest.mark.slow
def test_tied_layers_are_none_of_those_that_have_their_own_weights() -> None:
    layers = [Layer(i) for i in range(5)]
    layers[3].inner.weight = layers[1].inner.weight
    assert copied(Stack(layers)) == 4  # each has one weight, whoever else has it
    layers = [Pair(i) for i in range(5)]
    layers[2].other.weight = layers[2].inner.weight
    assert copied(Stack(layers)) == 3


class Pair(Layer):
    """Two linear layers, which may be one."""

    def __init__(self, index: int):
        super().__init__(index)
        self.other = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, more: float = 0.0) -> torch.Tensor:
        return super().forward(self.other(x), more)


def test_what_a_forward_sets_and_puts_back_is_seen() -> None:
    def call(layer: nn.Module, i: int, x: torch.Tensor) -> Any:
        MODE["scale"] = 2.0 if i == 2 else 1.0
        try:
            return layer(x)
        finally:
            MODE["scale"] = 1.0

    assert copied(Stack([Layer(i) for i in range(5)], call)) == 3


def test_layers_that_leave_something_behind_are_traced() -> None:
    class Noting(Layer):
        seen: ClassVar[list[int]] = []

        def forward(self, x: torch.Tensor, more: float = 0.0) -> torch.Tensor:
            self.seen.append(1)
            return super().forward(x, more)

    assert copied(Stack([Noting(i) for i in range(4)])) == 0


def test_layers_that_update_buffers_are_traced() -> None:
    class Counting(Layer):
        def __init__(self, index: int):
            super().__init__(index)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor, more: float = 0.0) -> torch.Tensor:
            self.calls.add_(1)
            return super().forward(x, more)

    assert copied(Stack([Counting(i) for i in range(4)])) == 0


def test_layers_of_a_forward_alone() -> None:
    skeleton = skeleton_of(Stack([Layer(i) for i in range(4)]), HOST)
    _, spec = flatten(tokens())
    with mock.patch.object(copies, "copied", wraps=copies.copied) as calls:
        graph = capture_evaluation(skeleton, spec, None, HOST).graph
    assert calls.call_count == 3
    with mock.patch.object(likeness, "FEWEST", 10**9):
        whole = capture_evaluation(skeleton, spec, None, HOST).graph
    assert graph.text() == whole.text()
    assert graph.fingerprint() == whole.fingerprint()


@settings(max_examples=3)
@given(
    st.lists(
        st.tuples(st.sampled_from([1.0, 2.0]), st.sampled_from([0.0, 0.1])), min_size=3, max_size=7
    )
)
def test_any_layers_may_differ(kinds: list[tuple[float, float]]) -> None:
    layers = [Layer(i, scale, drop) for i, (scale, drop) in enumerate(kinds)]
    assert copied(Stack(layers)) == len(kinds) - len(set(kinds))


def llama(layers: int, **more: Any) -> nn.Module:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = hf.LlamaConfig(
        num_hidden_layers=layers, num_key_value_heads=1, vocab_size=CLASSES, **shape, **more
    )
    return hf.LlamaForCausalLM(config)


@pytest.mark.slow
def test_layers_of_a_llama() -> None:
    assert copied(llama(4, use_cache=False)) == 3


def _bert() -> nn.Module:
    return hf.BertForMaskedLM(
        hf.BertConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            vocab_size=CLASSES,
        )
    )


def _gpt2(use_cache: bool) -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=CLASSES, use_cache=use_cache)
    )


def _t5() -> nn.Module:
    config = hf.T5Config(
        d_model=16, d_ff=24, d_kv=8, num_layers=5, num_heads=2, vocab_size=CLASSES, use_cache=False
    )
    config.decoder_start_token_id = 0
    return hf.T5ForConditionalGeneration(config)


def _mixtral() -> nn.Module:
    model = hf.MixtralForCausalLM(
        hf.MixtralConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            vocab_size=CLASSES,
            use_cache=False,
        )
    )
    return model.bfloat16()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "count"),
    [
        (_bert, 3),
        (lambda: _gpt2(False), 3),
        (lambda: _gpt2(True), 0),  # a cache knows the layers apart
        (_t5, 6),  # of encoder and decoder, but for the first of each and one more
        (_mixtral, 3),
        (lambda: llama(40, use_cache=False), 39),
    ],
)
def test_families(build: Callable[[], nn.Module], count: int) -> None:
    assert copied(build()) == count

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
from pipecompile.compiler.capture.capture import capture_evaluation
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.tracing import copies, likeness
from support.layered import CLASSES, HOST, MODE, Layer, Stack, copied, tokens
from torch import nn


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
        (lambda: _gpt2(True), 3),
        (_t5, 6),  # of encoder and decoder, but for the first of each and one more
        (_mixtral, 3),
        (lambda: llama(40, use_cache=False), 39),
        (lambda: llama(5, use_cache=True), 4),
    ],
)
def test_families(build: Callable[[], nn.Module], count: int) -> None:
    assert copied(build()) == count

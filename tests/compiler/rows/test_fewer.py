"""A loss is told without layers that are like others, as with all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from pipecompile.compiler.capture import capture
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.capture import capture_training
from pipecompile.compiler.capture.skeleton import skeleton_of
from support.layered import HOST, Layer, Stack, tokens
from support.matrix import quickly
from torch import nn

LAYERS = 8


class Told:
    """What was told of a loss without layers, and what of all of them."""

    def __init__(self, model: nn.Module, batch: Any = None, loss_fn: Any = None):
        _, spec = flatten(batch or tokens())
        skeleton = skeleton_of(model, HOST)
        self.whole: list[int] = []  # exports of all layers
        self.short: list[int] = []  # nodes of what was exported without
        exported, without = capture.exported, capture.exported_without

        def noted(*args: Any) -> Any:
            self.whole.append(1)
            return exported(*args)

        def noted_without(*args: Any) -> Any:
            made = without(*args)
            self.short.append(len(made.graph.nodes))
            return made

        with (
            mock.patch.object(capture, "exported", noted),
            mock.patch.object(capture, "exported_without", noted_without),
        ):
            found = capture_training(skeleton, spec, loss_fn, HOST, weighs=True)
        with mock.patch.object(capture, "without", return_value=None):
            full = capture_training(skeleton, spec, loss_fn, HOST, weighs=True)
        assert found.loss is not None
        assert full.loss is not None
        for name in ("terms", "factored", "sizes", "note", "warning"):
            assert getattr(found.loss, name) == getattr(full.loss, name)
        assert found.graph.text() == full.graph.text()
        assert found.graph.fingerprint() == full.graph.fingerprint()
        self.loss = found.loss

    @property
    def sooner(self) -> bool:
        """Without the second export of all layers."""
        return len(self.whole) == 1 and len(self.short) == 1


def stack(**more: Any) -> Stack:
    return Stack([Layer(i, **more) for i in range(LAYERS)])


def test_layers_that_are_alike_are_left_out() -> None:
    few, many = Told(stack()), Told(Stack([Layer(i) for i in range(2 * LAYERS)]))
    assert few.sooner
    assert many.sooner
    assert few.short == many.short  # whatever their number


def test_layers_that_read_what_differs_are_not() -> None:
    assert not Told(stack(reads=True)).sooner


def test_other_arguments_of_one_layer() -> None:
    def call(layer: nn.Module, i: int, x: torch.Tensor) -> Any:
        return layer(x, 1.0 if i == LAYERS - 3 else 0.0)

    assert not Told(Stack([Layer(i) for i in range(LAYERS)], call)).sooner


class Penalised(Stack):
    """Adds to its loss what each layer returned."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x, more = self.embed(input_ids), torch.zeros(())
        for layer in self.layers:
            x = layer(x)
            more = more + x.square().mean()
        logits = self.head(x).flatten(0, 1)
        return {"loss": nn.functional.cross_entropy(logits, labels.flatten()) + more}


class Decayed(Stack):
    """Adds to its loss the weights of its layers."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = super().forward(input_ids, labels)["loss"]
        return {"loss": loss + sum(layer.inner.weight.square().sum() for layer in self.layers)}


@pytest.mark.parametrize("kind", quickly([Penalised], [Penalised, Decayed]))
def test_layers_that_have_a_part_in_the_loss_are_not_left_out(kind: Callable[..., Stack]) -> None:
    told = Told(kind([Layer(i) for i in range(LAYERS)]))
    assert not told.sooner
    assert told.loss.note != Told(stack()).loss.note


class Norm(Layer):
    """Takes statistics over rows."""

    def __init__(self, index: int):
        super().__init__(index)
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)

    def forward(self, x: torch.Tensor, more: float = 0.0) -> torch.Tensor:
        made: torch.Tensor = self.norm(super().forward(x).transpose(1, 2)).transpose(1, 2)
        return made


def test_layers_that_couple_rows_are_told_of() -> None:
    told = Told(Stack([Norm(i) for i in range(LAYERS)]))
    assert "layers.0" in told.loss.warning


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=LAYERS, n_embd=16, n_head=2, vocab_size=48))


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 48}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return hf.LlamaForCausalLM(hf.LlamaConfig(num_hidden_layers=LAYERS, **sizes, **heads))


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 48}
    config = hf.BertConfig(num_hidden_layers=LAYERS, num_attention_heads=2, **sizes)
    return hf.BertForMaskedLM(config)


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("build", quickly([], [gpt2, llama, bert]), ids=lambda b: b.__name__)
def test_families(build: Callable[[], nn.Module], rows: int) -> None:
    ids = torch.zeros((rows, 8), dtype=torch.long)
    assert Told(build(), {"input_ids": ids, "labels": ids}).sooner

"""Layers that are differentiated once: the graph is the one in which all were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from pipecompile.compiler.capture import joint
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.capture import Captured, capture_evaluation, capture_training
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.ir.graph import JointGraph, tensors
from pipecompile.compiler.layers.copies import DifferentError
from support.matrix import quickly
from torch import nn

HOST = torch.device("cpu")
CLASSES = 16
TOKENS = {"input_ids": torch.zeros((2, 4), dtype=torch.long)} | {
    "labels": torch.zeros((2, 4), dtype=torch.long)
}


class Layer(nn.Module):
    """One that adds to what it is given.

    Args:
        kind: of what is special about it.
        index: its number.
    """

    def __init__(self, kind: str, index: int):
        super().__init__()
        self.kind, self.index = kind, index
        self.inner = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.1)
        self.table = torch.full((8,), float(index))  # neither a parameter nor a buffer
        if kind == "counts":
            self.register_buffer("count", torch.zeros(()))
        if kind == "adapters":
            self.inner.requires_grad_(False)
            self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        if kind == "unread":
            self.spare = nn.Parameter(torch.zeros(3))
            self.register_buffer("rest", torch.zeros(5))
        if kind == "half frozen" and index < 4:
            self.inner.requires_grad_(False)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        if self.kind == "adapters":
            y = y + self.up(self.down(x))
        if self.kind == "takes turns" and self.index % 2:
            y = torch.relu(y)
        if self.kind == "shared bias":
            y = y + bias
        if self.kind == "constants":
            y = y * self.table
        if self.kind == "reads its number":
            y = y * (1.0 + self.index)
        if self.kind == "counts":
            self.count += 1
        if self.kind == "in place":
            y.mul_(2.0)
        return x + self.drop(y)


class Stack(nn.Module):
    def __init__(self, kind: str, count: int = 10):
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(CLASSES, 8)
        self.bias = nn.Parameter(torch.zeros(8))
        self.layers = nn.ModuleList(Layer(kind, i) for i in range(count))
        self.head = nn.Linear(8, CLASSES, bias=False)
        if kind == "tied":
            self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        bias, seen = self.bias.exp(), []
        for layer in self.layers:
            x = layer(x, bias)
            seen.append(x.square().mean())
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        if self.kind == "looks at all":
            loss = loss + torch.stack(seen).sum()
        return {"loss": loss}


def captured(make: Callable[[], nn.Module], batch: dict[str, Any], trains: bool) -> Captured:
    _, spec = flatten(batch)
    torch.manual_seed(0)
    capture = capture_training if trains else capture_evaluation
    return capture(skeleton_of(make(), HOST), spec, None, HOST)


def told(graph: JointGraph) -> list[object]:
    """All that is to be known of a graph; numbers of operators by the order in which they occur."""
    numbers: dict[int, int] = {}
    lines: list[object] = [list(graph.params), list(graph.buffers), list(graph.grads)]
    for node in graph.graph.nodes:
        looks = [
            (tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad)
            for x in tensors(node.meta.get("val"))
        ]
        number = numbers.setdefault(node.meta.get("partner", -1), len(numbers))
        own = node.op, node.name, str(node.target), str(node.args), str(node.kwargs)
        more = {k: v for k, v in node.meta.items() if k not in ("val", "partner")}
        lines.append((*own, looks, number, more))
    return [*lines, *((name, value.tolist()) for name, value in graph.constants.named_buffers())]


def left_out(
    make: Callable[[], nn.Module],
    batch: dict[str, Any],
    trains: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> int:
    """How many layers were not differentiated, of a graph that is the same as with all of them."""
    counts = [0]
    kept = joint.replicated

    def counted(graph: JointGraph, runs: Any, *rest: Any) -> JointGraph:
        made = kept(graph, runs, *rest)
        counts.append(sum(run.count * run.layers for run in runs))
        return made

    with monkeypatch.context() as patched:
        patched.setattr(joint, "replicated", counted)
        short = captured(make, batch, trains).graph
    with monkeypatch.context() as patched:
        patched.setattr(joint, "runs_of", lambda _: [])
        whole = captured(make, batch, trains).graph
    assert told(short) == told(whole)
    assert short.fingerprint() == whole.fingerprint()
    return max(counts)


KINDS = {
    "plain": 6,
    "tied": 6,
    "shared bias": 5,
    "constants": 6,
    "adapters": 6,
    "unread": 6,
    "in place": 6,
    "reads its number": 0,
    "counts": 0,
    "looks at all": 0,
}


FEW = [kind for kind in KINDS if kind not in ("plain", "counts", "looks at all")]


@pytest.mark.parametrize("kind", quickly(FEW, KINDS))
def test_layers_are_differentiated_once_where_they_are_alike(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert left_out(lambda: Stack(kind), TOKENS, True, monkeypatch) == KINDS[kind]


def share_in_the_middle(stack: Stack) -> None:
    stack.layers[6].inner.weight = stack.layers[4].inner.weight


def share_with_the_next_one(stack: Stack) -> None:
    stack.layers[5].inner = stack.layers[4].inner


def share_with_a_neighbour(stack: Stack) -> None:
    for i in range(0, 10, 2):
        stack.layers[i + 1].inner.bias = stack.layers[i].inner.bias


def read_twice_outside(stack: Stack) -> None:
    stack.bias = stack.layers[5].inner.bias


def have_two_names(stack: Stack) -> None:
    for layer in stack.layers:
        layer.again = layer.inner
        layer.inner = nn.Linear(8, 8)
        layer.inner.weight = layer.again.weight
        layer.again.bias = layer.inner.bias


@pytest.mark.parametrize(
    ("tie", "count"),
    [
        (share_in_the_middle, 0),
        (share_with_the_next_one, 0),
        (share_with_a_neighbour, 0),
        (read_twice_outside, 0),
        (have_two_names, 6),
    ],
)
def test_what_layers_share_has_the_gradients_of_all(
    tie: Callable[[Stack], None], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever layers share it: also where those that are differentiated do not."""

    def make() -> Stack:
        stack = Stack("shared bias" if tie is read_twice_outside else "plain")
        tie(stack)
        return stack

    assert left_out(make, TOKENS, True, monkeypatch) == count


def test_layers_that_take_turns_are_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    assert left_out(lambda: Stack("takes turns", 18), TOKENS, True, monkeypatch) == 2 * 5


def test_frozen_layers_are_no_trained_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert left_out(lambda: Stack("half frozen", 14), TOKENS, True, monkeypatch) > 0


def test_few_layers_are_all_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert left_out(lambda: Stack("plain", 7), TOKENS, True, monkeypatch) == 0


def test_evaluation_has_no_backward_to_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert left_out(lambda: Stack("plain"), TOKENS, False, monkeypatch) == 6


def test_torch_is_not_given_the_parameters_of_layers_that_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[set[str]] = []
    kept = joint.aot_export_joint_with_descriptors

    def noted(stack: Any, module: nn.Module, leaves: Any) -> Any:
        given.append({name for name, _ in module.named_parameters()})
        return kept(stack, module, leaves)

    monkeypatch.setattr(joint, "aot_export_joint_with_descriptors", noted)
    graph = captured(lambda: Stack("plain", 20), TOKENS, True).graph
    assert len(given) == 1
    assert len(graph.params) == 3 + 20 * 2
    layers = {name.split(".layers.")[1].split(".")[0] for name in given[0] if ".layers." in name}
    assert layers == {"0", "1", "18", "19"}
    assert len(given[0]) == 3 + 4 * 2


def test_what_comes_out_different_is_differentiated_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> JointGraph:
        raise DifferentError("not alike")

    whole = told(captured(lambda: Stack("plain"), TOKENS, True).graph)
    kept = joint.replicated
    monkeypatch.setattr(
        joint, "replicated", lambda g, runs, *r: (refused if runs else kept)(g, runs, *r)
    )
    assert told(captured(lambda: Stack("plain"), TOKENS, True).graph) == whole


SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            n_layer=11, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0
        )
    ),
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(num_hidden_layers=11, num_key_value_heads=1, **SMALL)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(num_hidden_layers=11, **SMALL)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            num_layers=10, d_model=32, num_heads=2, d_kv=16, d_ff=64, decoder_start_token_id=0
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(num_hidden_layers=11, num_key_value_heads=1, num_local_experts=2, **SMALL)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_are_differentiated_in_part(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert left_out(MODELS[name], TOKENS, True, monkeypatch) >= 6

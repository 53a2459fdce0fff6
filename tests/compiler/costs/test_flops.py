"""FLOPs of whole models against formulas written down here.

Models and batches are on the meta device, as `pipecompile inspect` makes them: length costs
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from pipecompile.compiler.costs import cost
from pipecompile.compiler.costs.cost import node_cost, node_flops, unpriced
from pipecompile.compiler.costs.hardware import CPU
from pipecompile.compiler.ir.graph import Phase
from support.matrix import quickly
from support.units import captured
from torch import nn

VOCABULARY = 384


@dataclass(frozen=True)
class Work:
    """FLOPs of a forward, and of the backward.

    Attributes:
        weights: of products with weights: the backward has two for each.
        fused: of attention in one kernel, which computes the scores again: 5 products for 2.
        scores: of attention as two products: 4 for 2.
        ungrad: of products of which one gradient is not needed.
    """

    weights: float = 0.0
    fused: float = 0.0
    scores: float = 0.0
    ungrad: float = 0.0

    @property
    def forward(self) -> float:
        return self.weights + self.fused + self.scores

    @property
    def backward(self) -> float:
        return 2 * self.weights + 2.5 * self.fused + 2 * self.scores - self.ungrad


def triangle(s: int) -> float:
    """Pairs of a query and a key that is not behind it."""
    return s * (s + 1) / 2


Family = tuple[nn.Module, Any, Work]


def _text(kind: Any, config: Any, s: int, rows: int = 1) -> tuple[nn.Module, Any]:
    with torch.device("meta"):
        ids = torch.zeros(rows, s, dtype=torch.long)
        return kind(config).train(), {"input_ids": ids, "labels": ids.clone()}


def gpt2(s: int) -> Family:
    d, layers = 64, 2
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = hf.GPT2Config(
        n_layer=layers, n_embd=d, n_head=2, n_positions=s, vocab_size=VOCABULARY, **rates
    )
    weights = layers * 24 * s * d**2 + 2 * s * d * VOCABULARY
    work = Work(weights, fused=layers * 4 * d * triangle(s))
    return *_text(hf.GPT2LMHeadModel, config, s), work


def gpt2_with_dropout(s: int) -> Family:
    """Attention whose weights are dropped is written out: the whole square."""
    d, layers = 64, 2
    config = hf.GPT2Config(n_layer=layers, n_embd=d, n_head=2, n_positions=s, vocab_size=VOCABULARY)
    weights = layers * 24 * s * d**2 + 2 * s * d * VOCABULARY
    return *_text(hf.GPT2LMHeadModel, config, s), Work(weights, scores=layers * 4 * d * s**2)


_DECODER = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def _decoder(s: int, mlp: float, heads: float = 64, narrow: float = 32) -> float:
    """Two layers of width 64, keys and values of 32; ``mlp``: weights of one layer's."""
    attention = 2 * 64 * heads + 2 * 64 * narrow
    return 2 * 2 * s * (attention + mlp) + 2 * s * 64 * VOCABULARY


def llama(s: int) -> Family:
    config = hf.LlamaConfig(**_DECODER, max_position_embeddings=s)
    work = Work(_decoder(s, 3 * 64 * 160), fused=2 * 4 * 64 * triangle(s))
    return *_text(hf.LlamaForCausalLM, config, s), work


def mistral(s: int) -> Family:
    """A sliding window is a mask: all scores are computed."""
    config = hf.MistralConfig(**_DECODER, sliding_window=256, max_position_embeddings=s)
    work = Work(_decoder(s, 3 * 64 * 160), fused=2 * 4 * 64 * s**2)
    return *_text(hf.MistralForCausalLM, config, s), work


def mixtral(s: int) -> Family:
    """Two of four experts for each token, and a router."""
    config = hf.MixtralConfig(
        **_DECODER, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=s
    )
    mlp = 64 * 4 + 2 * 3 * 64 * 160
    work = Work(_decoder(s, mlp), fused=2 * 4 * 64 * triangle(s))
    return *_text(hf.MixtralForCausalLM, config, s), work


def gemma2(s: int) -> Family:
    """Soft caps of scores: attention is written out."""
    config = hf.Gemma2Config(**_DECODER, head_dim=32, max_position_embeddings=s)
    work = Work(_decoder(s, 3 * 64 * 160, 128, 64), scores=2 * 4 * 128 * s**2)
    return *_text(hf.Gemma2ForCausalLM, config, s), work


def deepseek(s: int) -> Family:
    """Latent queries, keys and values; values are narrower, so that no kernel takes them; one dense
    layer, one of experts, one of them shared."""
    config = hf.DeepseekV3Config(
        **_DECODER | {"num_key_value_heads": 4},
        q_lora_rank=48,
        kv_lora_rank=40,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=20,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=56,
        first_k_dense_replace=1,
        max_position_embeddings=s,
    )
    queries = 64 * 48 + 48 * 4 * (16 + 8)
    rest = 64 * (40 + 8) + 40 * 4 * (16 + 20) + 4 * 20 * 64
    mlps = 3 * 64 * 160 + 64 * 8 + (2 + 1) * 3 * 64 * 56
    weights = 2 * s * (2 * (queries + rest) + mlps) + 2 * s * 64 * VOCABULARY
    scores = 2 * 2 * 4 * (16 + 8 + 20) * s**2
    return *_text(hf.DeepseekV3ForCausalLM, config, s), Work(weights, scores=scores)


def bert(s: int) -> Family:
    d, f, layers = 64, 160, 2
    config = hf.BertConfig(
        num_hidden_layers=layers,
        hidden_size=d,
        intermediate_size=f,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=s,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    weights = 2 * s * (layers * (4 * d**2 + 2 * d * f) + d**2 + d * VOCABULARY)
    work = Work(weights, fused=layers * 4 * d * s**2)
    return *_text(hf.BertForMaskedLM, config, s), work


def bart(s: int) -> Family:
    """Encoder, decoder and what the decoder sees of the encoder, all of s tokens."""
    d, f, layers = 64, 160, 2
    config = hf.BartConfig(
        d_model=d,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_ffn_dim=f,
        decoder_ffn_dim=f,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=s,
        dropout=0.0,
        attention_dropout=0.0,
        decoder_start_token_id=2,
    )
    weights = 2 * s * (layers * (3 * 4 * d**2 + 2 * 2 * d * f) + d * VOCABULARY)
    fused = layers * 4 * d * (2 * s**2 + triangle(s))
    return *_text(hf.BartForConditionalGeneration, config, s), Work(weights, fused)


def t5(s: int) -> Family:
    """Biases of relative positions: attention is written out."""
    d, f, inner, layers = 64, 160, 48, 2
    config = hf.T5Config(
        d_model=d,
        d_ff=f,
        num_layers=layers,
        num_heads=2,
        d_kv=24,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    weights = 2 * s * (layers * (3 * 4 * d * inner + 2 * 2 * d * f) + d * VOCABULARY)
    work = Work(weights, scores=layers * 3 * 4 * inner * s**2)
    return *_text(hf.T5ForConditionalGeneration, config, s), work


def mamba(s: int) -> Family:
    """A state of 16 per channel, read once per token; the scan itself goes element by element."""
    d, inner, state, rank, kernel, layers = 32, 64, 16, 4, 4, 2
    config = hf.MambaConfig(
        num_hidden_layers=layers,
        hidden_size=d,
        state_size=state,
        time_step_rank=rank,
        vocab_size=VOCABULARY,
    )
    projections = d * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * d
    scan = inner * state
    conv = 2 * inner * kernel * (s + kernel - 1)
    weights = layers * (2 * s * (projections + scan) + conv) + 2 * s * d * VOCABULARY
    return *_text(hf.MambaForCausalLM, config, s), Work(weights)


def vit(s: int) -> Family:
    """Of s patches; images need no gradient."""
    d, f, layers, patch = 64, 160, 2, 8
    side = patch * round(s**0.5)
    config = hf.ViTConfig(
        num_hidden_layers=layers,
        hidden_size=d,
        intermediate_size=f,
        num_attention_heads=2,
        image_size=side,
        patch_size=patch,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    with torch.device("meta"):
        model = hf.ViTForImageClassification(config).train()
        batch = {
            "pixel_values": torch.zeros(1, 3, side, side),
            "labels": torch.zeros(1, dtype=torch.long),
        }
    cut = 2 * s * 3 * patch**2 * d
    weights = cut + layers * 2 * (s + 1) * (4 * d**2 + 2 * d * f) + 2 * d * 10
    return model, batch, Work(weights, fused=layers * 4 * d * (s + 1) ** 2, ungrad=cut)


def resnet(s: int) -> Family:
    """Of images of s pixels: two stages of two layers with two convolutions each."""
    side, rows = round(s**0.5), 2
    config = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=10
    )
    with torch.device("meta"):
        model = hf.ResNetForImageClassification(config).train()
        batch = {
            "pixel_values": torch.zeros(rows, 3, side, side),
            "labels": torch.zeros(rows, dtype=torch.long),
        }
    first = 2 * rows * (side // 2) ** 2 * 3 * 16 * 49
    large = 2 * rows * (side // 4) ** 2 * 4 * 16 * 16 * 9
    small = 2 * rows * (side // 8) ** 2 * (16 * 32 * 9 + 3 * 32 * 32 * 9 + 16 * 32)
    return model, batch, Work(first + large + small + 2 * rows * 32 * 10, ungrad=first)


class _Encoder(nn.Module):
    def __init__(self, d: int, f: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(d, 2, f, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x).square().mean()


def encoder(s: int) -> Family:
    """What goes in needs no gradient, so its three projections have one product less."""
    d, f, layers = 64, 160, 2
    with torch.device("meta"):
        model, batch = _Encoder(d, f, layers).train(), torch.zeros(2, s, d)
    weights = layers * 2 * 2 * s * (4 * d**2 + 2 * d * f)
    work = Work(weights, fused=layers * 2 * 4 * d * s**2, ungrad=2 * 2 * s * 3 * d**2)
    return model, batch, work


LONG = (1024, 4096, 16384, 65536)
FAMILIES: dict[Callable[[int], Family], tuple[int, ...]] = {
    **dict.fromkeys((gpt2, gpt2_with_dropout, llama, mistral, mixtral, gemma2), LONG),
    **dict.fromkeys((deepseek, bert, bart, t5, vit, resnet, encoder), LONG),
    mamba: (32, 96),  # traced token by token
}
CASES = [(family, s) for family, lengths in FAMILIES.items() for s in lengths]


@pytest.mark.parametrize(
    ("family", "s"),
    quickly([(llama, 65536), (encoder, 1024), (resnet, 1024)], CASES),
)
def test_flops_of_a_family(family: Callable[[int], Family], s: int) -> None:
    model, batch, work = family(s)
    graph = captured(model, batch)
    forward = sum(map(node_flops, graph.ops(Phase.FORWARD)))
    backward = sum(map(node_flops, graph.ops(Phase.BACKWARD)))
    assert forward == pytest.approx(work.forward, rel=0.005)
    assert backward == pytest.approx(work.backward, rel=0.005)
    assert unpriced(graph.ops(), CPU) == ""


def test_what_copies_of_operators_cost_is_not_worked_out_again() -> None:
    """Unless they call another operator, or have other operands."""
    x = torch.randn(4, 8)
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    graph = captured(Squared(layers), {"x": x})
    before = [node_cost(node, CPU) for node in graph.ops()]
    with mock.patch.object(cost, "flops_of", side_effect=AssertionError("worked out again")):
        assert [node_cost(node, CPU) for node in graph.copy()[0].ops()] == before
    copies = zip(graph.ops(), graph.copy()[0].ops(), strict=True)
    products = [copy for node, copy in copies if node_flops(node)]
    assert len(products) == 5  # the batch has no gradient
    changed, wider = products[:2]
    changed.target = torch.ops.aten.minimum.default
    assert node_flops(changed) == 0
    wider.all_input_nodes[0].meta["val"] = torch.empty((8, 8), device="meta")
    assert node_flops(wider) == 2 * 8**3


class Squared(nn.Module):
    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y.square().mean()

"""Small real models, one per thing that can go wrong; dropout off unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 96
Batch = dict[str, torch.Tensor]


def gpt2(dropout: float = 0.0, **changes: Any) -> nn.Module:
    """Tied input and output embeddings."""
    config = {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**(config | rates | changes)))


def llama(**changes: Any) -> nn.Module:
    """Rotary embeddings, grouped-query attention, nothing tied."""
    config = {
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
    }
    return hf.LlamaForCausalLM(hf.LlamaConfig(**(config | changes)))


_BERT = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def bert_classifier() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(num_labels=3, **_BERT))


def bert_mlm() -> nn.Module:
    """Tied decoder, with a bias under two names."""
    return hf.BertForMaskedLM(hf.BertConfig(**_BERT))


def bart() -> nn.Module:
    """Encoder-decoder: the encoder's output skips stages; a weight tied three ways."""
    config = hf.BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=1,
        decoder_start_token_id=2,
    )
    return hf.BartForConditionalGeneration(config)


def t5() -> nn.Module:
    """Relative position biases that every layer shares, and a weight tied three ways."""
    config = hf.T5Config(
        d_model=32,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        d_kv=16,
        vocab_size=VOCABULARY,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config)


def mixtral() -> nn.Module:
    """Experts: integer values that depend on the data, and a load-balancing loss."""
    config = hf.MixtralConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        num_local_experts=4,
        output_router_logits=True,
    )
    return hf.MixtralForCausalLM(config)


def vit() -> nn.Module:
    """Images, convolution."""
    config = hf.ViTConfig(
        num_hidden_layers=3,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return hf.ViTForImageClassification(config)


class Residual(nn.Module):
    """x + tanh(linear(x)), so many times; captured in a tenth of a second."""

    def __init__(self, layers: int, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.square().mean()


def tokens(rows: int, length: int = 12) -> Batch:
    ids = torch.randint(3, VOCABULARY, (rows, length))
    return {"input_ids": ids, "labels": ids.clone()}


def padded(rows: int, length: int = 12) -> Batch:
    """With an attention mask, so that masks are made from the batch."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[::2, length // 2 :] = 0
    return tokens(rows, length) | {"attention_mask": mask}


def classified(rows: int) -> Batch:
    return {"input_ids": padded(rows)["input_ids"], "labels": torch.randint(0, 3, (rows,))}


def images(rows: int) -> Batch:
    return {"pixel_values": torch.randn(rows, 3, 16, 16), "labels": torch.randint(0, 3, (rows,))}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "gpt2": (gpt2, tokens),
    "llama": (llama, padded),
    "llama-deep": (partial(llama, num_hidden_layers=5), padded),
    "bert-classifier": (bert_classifier, classified),
    "bert-mlm": (bert_mlm, padded),
    "bart": (bart, padded),
    "t5": (t5, padded),
    "mixtral": (mixtral, tokens),
    "vit": (vit, images),
}


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name][0]()


def batches(name: str, rows: int, count: int, seed: int = 1) -> list[Batch]:
    torch.manual_seed(seed)
    return [MODELS[name][1](rows) for _ in range(count)]

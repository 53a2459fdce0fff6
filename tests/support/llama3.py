"""Llamas of the third generation, in their true sizes: to be built without data."""

from __future__ import annotations

import transformers as hf
from torch import nn

CLASSES = 128256


def llama3(
    hidden: int, inner: int, layers: int, heads: int, tokens: int = 8192, tied: bool = False
) -> nn.Module:
    """Args:
    inner: the width of the MLPs.
    """
    config = hf.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=CLASSES,
        max_position_embeddings=tokens,
        use_cache=False,
        tie_word_embeddings=tied,
    )
    return hf.LlamaForCausalLM(config)

"""Decoders of the MPT family, as their published training runs had them.

Learned positions, biases everywhere, an MLP of four times the width, an embedding that is also the
output head. Numbers of parameters are those of the published tables, to the last one.
"""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual: (rows, tokens, width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x.shape
        split = self.qkv(self.norm_1(x)).view(rows, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # (rows, heads, tokens, width)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, tokens, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))


class Mpt(nn.Module):
    """Its forward takes token ids and labels, which stand under the token that predicts them."""

    def __init__(self, width: int, heads: int, layers: int, vocab: int, tokens: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.wte(input_ids) + self.wpe.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = nn.functional.linear(self.norm(x), self.wte.weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

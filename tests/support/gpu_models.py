"""The models of tests/gpu/figures.py, and who computes with them. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Size:
    """A model and its batch.

    Attributes:
        kind: "gpt2" or "llama".
        config: of transformers.
        rows: of a microbatch.
        length: tokens of a row.
    """

    name: str
    kind: str
    config: dict[str, Any] = field(hash=False)
    rows: int
    length: int
    microbatches: int = 4

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * self.length * self.microbatches

    @property
    def described(self) -> str:
        return f"{self.microbatches} microbatches of {self.rows} × {self.length} tokens"


_NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
GPT2 = Size("GPT-2 small", "gpt2", {"n_positions": 1024, **_NO_DROPOUT}, 8, 1024)
LLAMA = Size(
    "Llama-1B shape",
    "llama",
    {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    2,
    2048,
)
SIZES = (GPT2, LLAMA)
_TINY = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 32, "vocab_size": 512}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
SMALL = (Size("GPT-2, tiny", "gpt2", {**_TINY, **_ENDS, **_NO_DROPOUT}, 2, 32, 2),)

CONTENDERS = (
    "torch.compile",
    "ours, inductor",
    "ours, eager",
    "plain, eager",
    "ours, inductor, CUDA graphs",
    "ours, eager, CUDA graphs",
)
"""In the order in which they are run: what matters most first."""

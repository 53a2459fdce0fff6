"""What prune.py, quantize.py and tune.py share: text, a small Llama, and words of a comparison."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator, Mapping
from pydoc_data.topics import topics

import torch
from torch import nn


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For imports: torchao says which of its CUDA libraries it cannot load, and none is needed."""
    logging.disable(logging.WARNING)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except ImportError:
        sys.stderr.write(said.getvalue())
        raise
    finally:
        logging.disable(logging.NOTSET)


with quiet():  # transformers imports it, too
    from transformers import LlamaConfig, LlamaForCausalLM

SEQ, BATCH, MICROBATCHES = 64, 16, 4  # bytes in a row, rows in a batch, pieces of it

Batch = dict[str, torch.Tensor]


def read_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of Python's own documentation for training, and the last twentieth for evaluation."""
    data = torch.tensor(list("".join(topics.values()).encode()))
    cut = len(data) * 19 // 20
    return data[:cut], data[cut:]


def sample(text: torch.Tensor, steps: int, seed: int = 0) -> Iterator[Batch]:
    """Random rows, one batch per step; the model shifts the labels itself."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - SEQ, (BATCH,), generator=generator)
        rows = torch.stack([text[start : start + SEQ] for start in starts])
        yield {"input_ids": rows, "labels": rows}


def llama(heads: int = 4, layers: int = 2) -> LlamaForCausalLM:
    """96 wide; each head has 16, however many there are."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=16,
        max_position_embeddings=SEQ,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def evaluate_plainly(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The model's loss on one device, in the same pieces."""
    model.eval()
    pieces = zip(*(rows.chunk(MICROBATCHES) for rows in batch.values()), strict=True)
    losses = [model(**dict(zip(batch, piece, strict=True))).loss for piece in pieces]
    model.train()
    return torch.stack(losses).mean()


def compared(what: str, mine: Mapping[str, object], theirs: Mapping[str, object]) -> str:
    """One line: whether all tensors have equal bits, or which is the first that has not."""
    differing = [
        name
        for name, value in mine.items()
        if isinstance(value, torch.Tensor) and not torch.equal(value, theirs[name])  # type: ignore[arg-type]
    ]
    if mine.keys() != theirs.keys() or differing:
        return f"{what}: DIFFERS from one device, in {(differing or ['names'])[0]}"
    return f"{what}: the bits of one device, {len(mine)} tensors"

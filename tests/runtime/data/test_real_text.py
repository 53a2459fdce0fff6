"""Documents of all lengths, as they come: padded to the longest of the batch."""

from __future__ import annotations

import copy
from functools import partial
from itertools import islice
from pydoc_data import topics
from typing import Any

import pipecompile
import pytest
import torch
from support import jobs, token_steps
from support.token_steps import IGNORED, Batch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

WORDS, ROWS, MICROBATCHES = 96, 4, 2


def documents() -> list[torch.Tensor]:
    """Texts of Python's own help, cut to 20 to 400 letters."""
    texts = [text.encode() for _, text in sorted(topics.topics.items())]
    cut = [text[: 20 + (37 * i) % 381] for i, text in enumerate(texts)]
    return [torch.tensor(list(text)) % WORDS for text in cut if len(text) >= 20]


def padded(found: list[torch.Tensor]) -> Batch:
    longest = max(map(len, found))
    shape = len(found), longest
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED),
    }
    for row, text in enumerate(found):
        batch["input_ids"][row, : len(text)] = text
        batch["attention_mask"][row, : len(text)] = 1
        batch["labels"][row, : len(text)] = text
    return batch


def llama(layers: int = 3) -> nn.Module:
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=WORDS, n_embd=32, n_layer=3, n_head=4, n_positions=512, bos_token_id=0
    )
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    config.eos_token_id = 0
    return GPT2LMHeadModel(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (partial(llama, 1), 3),
        pytest.param(llama, 6, marks=pytest.mark.slow),
        pytest.param(llama, 30, marks=pytest.mark.slow),
        pytest.param(gpt2, 30, marks=pytest.mark.slow),
    ],
)
def test_documents_of_all_lengths(traces: list[bool], make: Any, steps: int) -> None:
    """With the bits of the plain loop; some lengths are traced, and then one graph is for all."""
    torch.manual_seed(0)
    model = make()
    pipe = pipecompile.compile(
        copy.deepcopy(model), 2, microbatches=MICROBATCHES, optimizer=jobs.OPTIMIZERS["adamw"]
    )
    optimizer = jobs.OPTIMIZERS["adamw"](model.parameters())
    lengths = set()
    for batch in islice(pipe.loader(documents(), ROWS, collate_fn=padded), steps):
        lengths.add(batch["input_ids"].shape[1])
        loss, expected = pipe.step(batch), token_steps.step(model, optimizer, batch, MICROBATCHES)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # sums of two round
    state = pipe.state_dict()
    assert not [n for n, each in model.state_dict().items() if not torch.equal(state[n], each)]
    assert len(lengths) > steps // 2
    # graphs with and without a mask, for two rows and for one, each with twice the rows as well,
    # which tells how to weigh; and a general one, which is for all lengths
    assert traces.count(True) >= 1
    assert len(traces) <= 9

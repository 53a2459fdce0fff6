"""Models small enough to train on a CPU, and large enough that operators cost more than Python."""

from __future__ import annotations

import torch
import transformers as hf

LENGTH = 128
VOCABULARY = 4096


def gpt2() -> torch.nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=8, n_embd=256, n_head=8, vocab_size=VOCABULARY, n_positions=LENGTH)
    )


def llama() -> torch.nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            num_hidden_layers=6,
            hidden_size=320,
            intermediate_size=864,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=VOCABULARY,
        )
    )


def bert() -> torch.nn.Module:
    return hf.BertForMaskedLM(
        hf.BertConfig(
            num_hidden_layers=6,
            hidden_size=384,
            intermediate_size=1536,
            num_attention_heads=6,
            vocab_size=VOCABULARY,
        )
    )


def t5() -> torch.nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=256,
            d_ff=1024,
            num_layers=4,
            num_heads=8,
            d_kv=32,
            vocab_size=VOCABULARY,
            decoder_start_token_id=0,
        )
    )


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert, "t5": t5}


def build(name: str) -> torch.nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    return MODELS[name]()


def batch(rows: int) -> dict[str, torch.Tensor]:
    """Random token ids, (rows, LENGTH), the same every time."""
    ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}

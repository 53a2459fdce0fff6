"""Small models with peft's adapters, and the batches that they are trained with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pipecompile
import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from support import plain

peft = pytest.importorskip("peft")

LAYERS = 2
ADAMW = partial(torch.optim.AdamW, lr=1e-2)
MICROBATCHES = 2


def base(seed: int = 3, tied: bool = False, layers: int = LAYERS) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=97,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config)


def lora(**options: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.LoraConfig(task_type="CAUSAL_LM", **settings | options)


def prompt(**options: Any) -> Any:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **options)


def adapted(config: Any, seed: int = 3, tied: bool = False, layers: int = LAYERS) -> Any:
    model = base(seed, tied, layers)
    torch.manual_seed(4)
    return peft.get_peft_model(model, config)


CONFIGS: Mapping[str, Callable[[], Any]] = {
    "lora": lora,
    "upper": partial(lora, layers_to_transform=[1]),
    "dora": partial(lora, use_dora=True),
    "prompt": prompt,
}


def batch(step: int, rows: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 90, (rows, 9), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def compiled(model: nn.Module, n_stages: int, dp: int = 1, **options: Any) -> Any:
    options = {"optimizer": ADAMW, "microbatches": MICROBATCHES, "max_grad_norm": 0.3} | options
    return pipecompile.compile(model, n_stages, dp, **options)


def share(pipe: Any, step: int) -> dict[str, torch.Tensor]:
    return plain.cut(batch(step), pipe.data_shards)[pipe.data_shard]


def trained_plainly(
    model: nn.Module, steps: int, pieces: int, dtype: torch.dtype | None = None
) -> tuple[list[torch.Tensor], nn.Module]:
    """The same steps in one process without pipecompile; the losses, and the model."""
    model = copy.deepcopy(model)
    optimizer = ADAMW([param for param in model.parameters() if param.requires_grad])
    losses = []
    for step in range(steps):
        parts = []
        for piece in plain.cut(batch(step), pieces):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = model(**piece).loss
            (loss / pieces).backward()
            parts.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack(parts).mean())
    return losses, model

"""Small tasks for a Trainer: models without dropout, rows of many lengths, collators that pad."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 96
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "use_cache": False,
}
TASKS = ("classification", "causal", "tokens")


def model_of(task: str) -> nn.Module:
    torch.manual_seed(0)
    if task == "causal":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    config = transformers.BertConfig(**BERT, num_labels=2 if task == "classification" else 5)
    if task == "classification":
        return transformers.BertForSequenceClassification(config)
    return transformers.BertForTokenClassification(config)


def rows_of(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    drawn = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        size = int(torch.randint(4, 12, (1,), generator=drawn))
        ids = torch.randint(1, VOCABULARY, (size,), generator=drawn)
        labels = {"classification": ids.sum() % 2, "causal": ids, "tokens": ids % 5}[task]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded to the longest of the rows."""
    padded = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    ids = [row["input_ids"] for row in rows]
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": padded(ids),
        "attention_mask": padded([torch.ones_like(each) for each in ids]),
        "labels": padded(labels, padding_value=-100) if labels[0].dim() else torch.stack(labels),
    }


def collate_alike(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded to the longest that `rows_of` makes, so that one program runs them all."""
    longest = {"input_ids": torch.ones(12), "labels": torch.ones(12)}
    batch = collate([*rows, {key: value.long() for key, value in longest.items()}])
    return {key: value[:-1] for key, value in batch.items()}


def accuracy(predicted: Any) -> dict[str, float]:
    kept = predicted.label_ids != -100
    right = predicted.predictions.argmax(-1) == predicted.label_ids
    return {"accuracy": float(right[kept].mean())}


def arguments(folder: Any, **options: Any) -> Any:
    given = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return transformers.TrainingArguments(str(folder), **given | options)


def trainer(make: Any, task: str, args: Any, **options: Any) -> Any:
    given = {
        "data_collator": collate,
        "train_dataset": rows_of(task, 22),
        "eval_dataset": rows_of(task, 9, seed=1),
        "compute_metrics": accuracy,
    }
    return make(model_of(task), args, **given | options)


TIMES = ("runtime", "per_second", "total_flos")


def logged(trained: Any) -> list[dict[str, float]]:
    """What a Trainer has logged, without times."""
    return [
        {key: value for key, value in each.items() if not any(t in key for t in TIMES)}
        for each in trained.state.log_history
    ]

"""Fine-tune a small BERT by Trainer's own script, with three lines changed.

    python examples/finetune_trainer.py                    # one process plays all ranks
    torchrun --nproc-per-node 2 examples/finetune_trainer.py
    python examples/finetune_trainer.py --plain            # transformers.Trainer itself

Which of two packages of Python's library is a snippet from? Their sources are the data. Without
dropout all three print the same losses, to the bound that docs/from_hf.md has.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from pipecompile.integrations.transformers import PipelineTrainer  # was: transformers' Trainer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

PACKAGES = ("asyncio", "email")
PADDING = 256  # after the bytes, which are the tokens


def snippets(count: int, length: int) -> list[dict[str, Any]]:
    """As many of each package, of up to so many bytes, in a drawn order."""
    library, drawn = Path(sysconfig.get_path("stdlib")), random.Random(0)
    rows = []
    for label, package in enumerate(PACKAGES):
        text = b"".join(path.read_bytes() for path in sorted((library / package).glob("*.py")))
        for _ in range(count // 2):
            start, size = drawn.randrange(len(text) - length), drawn.randint(length // 2, length)
            rows.append({"input_ids": list(text[start : start + size]), "labels": label})
    drawn.shuffle(rows)
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded to a multiple of 32, so that there are few programs."""
    longest = -(-max(len(row["input_ids"]) for row in rows) // 32) * 32
    ids = torch.full((len(rows), longest), PADDING)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long(), "labels": labels}


def accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", action="store_true", help="train with transformers.Trainer")
    parser.add_argument("--rows", type=int, default=1000, help="training examples")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--output", default="finetuned")
    given = parser.parse_args()

    set_seed(0)
    config = BertConfig(
        vocab_size=PADDING + 1,
        hidden_size=given.width,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * given.width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: Any = BertForSequenceClassification(config)
    model.accepts_loss_kwargs = False  # it reads no num_items_in_batch: see docs/from_hf.md
    rows = snippets(given.rows + 100, length=96)
    args = TrainingArguments(
        given.output,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=4,
        num_train_epochs=given.epochs,
        learning_rate=5e-4,
        warmup_steps=10,
        weight_decay=0.01,
        logging_steps=10,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        report_to="none",
    )
    make = Trainer if given.plain else PipelineTrainer
    trainer = make(  # was: Trainer(
        model,
        args,
        data_collator=collate,
        train_dataset=rows[:-100],
        eval_dataset=rows[-100:],
        compute_metrics=accuracy,
        **({} if given.plain else {"pipeline": {"n_stages": 2}}),  # the third line
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    if trainer.is_world_process_zero():
        last = [each for each in trainer.state.log_history if "eval_loss" in each][-1]
        print(f"held-out loss {last['eval_loss']:.6f} accuracy {last['eval_accuracy']:.3f}")
        print(f"{trainer.state.global_step} steps in {seconds:.1f} s")


if __name__ == "__main__":
    main()

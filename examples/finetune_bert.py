"""Fine-tune a BERT classifier: is a snippet of code from `email` or from `asyncio`?

1,000 training and 100 validation examples, 10 to a batch, AdamW, linear warm-up, mixed precision,
as the articles on fine-tuning BERT have it; a report per class after each epoch.

    python examples/finetune_bert.py                                    # one process
    torchrun --nproc-per-node 2 examples/finetune_bert.py               # two stages, two processes
    python examples/finetune_bert.py --compare --train 200              # beside one device
"""

from functools import partial

import pipecompile
from common.compare import compare
from common.options import parser, settle
from common.text import snippets, train_tokenizer
from sklearn.metrics import classification_report
from torch.optim import AdamW
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

PACKAGES = ("email", "asyncio")
LONGEST = 128  # tokens


def examples(train: int, validation: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Pairs (snippet, class); the classes take turns."""
    half = (train + validation + 1) // 2
    texts = zip(*(snippets(package, half) for package in PACKAGES), strict=True)
    pairs = [(text, label) for both in texts for label, text in enumerate(both)]
    return pairs[:train], pairs[train : train + validation]


def encoded(tokenizer, pairs):
    inputs = tokenizer([text for text, _ in pairs], truncation=True, max_length=LONGEST)
    return [
        {"input_ids": ids, "labels": label}
        for ids, (_, label) in zip(inputs["input_ids"], pairs, strict=True)
    ]


def report(labels, predicted):
    return classification_report(
        labels, predicted, labels=[0, 1], target_names=PACKAGES, digits=3, zero_division=0
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--epochs", type=int, default=3)
    arguments.add_argument("--train", type=int, default=1000)
    arguments.add_argument("--validation", type=int, default=100)
    arguments.add_argument("--batch", type=int, default=10)
    arguments.add_argument("--lr", type=float, default=2e-4, help="2e-5 for pre-trained weights")
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--width", type=int, default=64)
    arguments.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = arguments.parse_args()
    settle(args.seed)

    train, validation = examples(args.train, args.validation)
    tokenizer = train_tokenizer((text for text, _ in train), size=2000)

    collate = DataCollatorWithPadding(tokenizer)  # each batch to its own longest
    batches = pipecompile.data.batches(
        encoded(tokenizer, train), args.batch, shuffle=True, collate_fn=collate
    )
    steps = args.epochs * len(batches)
    dropout = 0.0 if args.compare else 0.1
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            intermediate_size=4 * args.width,
            max_position_embeddings=LONGEST,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=len(PACKAGES),
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    training = {
        "dp": args.dp,
        "microbatches": 5,
        "optimizer": partial(AdamW, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.01),
        "lr_scheduler": partial(
            get_linear_schedule_with_warmup,
            num_warmup_steps=steps // 10,
            num_training_steps=steps,
        ),
        "max_grad_norm": 1.0,
        "precision": args.precision,
    }
    pipe = pipecompile.compile(model, args.stages, **training)
    loader = pipe.loader(batches)
    held_out = pipe.loader(encoded(tokenizer, validation), 50, collate_fn=collate)
    metrics = {
        "accuracy": lambda out, batch: out.logits.argmax(-1) == batch["labels"],
        "report": pipecompile.Collected(
            lambda out, batch: (batch["labels"], out.logits.argmax(-1)), report
        ),
    }
    losses, seen = [], []
    for epoch in range(1, args.epochs + 1):
        for batch in tqdm(loader, desc=f"epoch {epoch}", disable=not pipe.is_main):
            losses.append(pipe.step(batch))
            seen.append(batch)
        found = pipe.evaluate(held_out, metrics=metrics)
        if pipe.is_main:
            print(f"epoch {epoch}: validation loss {found['loss']:.4f}", end=", ")
            print(f"accuracy {found['accuracy']:.3f}\n{found['report']}")
    if args.compare:
        compare(pipe, model, seen, losses, **training)


if __name__ == "__main__":
    main()

"""Translate names from one convention into another with BART or T5: get_file_size -> getFileSize.

The text is real, all names with underscores in the standard library's sources; a token is a letter.
Encoder-decoders keep what the encoder made for all stages of the decoder, which is what pipelines
that are written by hand find hard.

    python examples/seq2seq.py                                      # BART
    torchrun --nproc-per-node 2 examples/seq2seq.py --model t5
    python examples/seq2seq.py --compare --train 128 --epochs 1
"""

import re
from functools import partial

import pipecompile
import torch
from common.compare import compare
from common.options import parser, settle
from common.text import sources, train_tokenizer
from torch.optim import AdamW
from tqdm import tqdm
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    T5Config,
    T5ForConditionalGeneration,
    get_cosine_schedule_with_warmup,
)

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest")


def names() -> list[str]:
    """All that have an underscore inside, in an order of their own."""
    text = " ".join(path.read_text("utf-8") for package in PACKAGES for path in sources(package))
    found = sorted(set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text)))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[i] for i in order]


def translated(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(map(str.capitalize, rest))


def build(kind: str, tokenizer, width: int, layers: int, dropout: float):
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind == "t5":
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // 4,
            d_ff=4 * width,
            num_layers=layers,
            num_heads=4,
            dropout_rate=dropout,
            decoder_start_token_id=tokenizer.pad_token_id,
            **ids,
        )
        return T5ForConditionalGeneration(config)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=64,
        dropout=dropout,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        init_std=width**-0.5,  # 0.02 is that of wide models
        forced_eos_token_id=None,
        **ids,
    )
    return BartForConditionalGeneration(config)


def right(output, batch):
    """Of each letter of the translation, whether it is the most likely one after those before."""
    kept = batch["labels"] != -100
    return (output.logits.argmax(-1) == batch["labels"])[kept]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", choices=("bart", "t5"), default="bart")
    arguments.add_argument("--epochs", type=int, default=6)
    arguments.add_argument("--train", type=int, default=2000, help="names, at most")
    arguments.add_argument("--validation", type=int, default=200)
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--lr", type=float, default=1e-3)
    arguments.add_argument("--layers", type=int, default=2, help="of encoder and decoder each")
    arguments.add_argument("--width", type=int, default=64)
    args = arguments.parse_args()
    settle(args.seed)

    found = [name for name in names() if len(name) < 32]
    validation, train = found[: args.validation], found[args.validation :][: args.train]
    tokenizer = train_tokenizer(train, size=0)  # bytes, and nothing that is merged of them

    def encoded(some):
        inputs = tokenizer(some)["input_ids"]
        targets = tokenizer([translated(name) for name in some])["input_ids"]
        return [{"input_ids": i, "labels": t[1:]} for i, t in zip(inputs, targets, strict=True)]

    model = build(args.model, tokenizer, args.width, args.layers, 0.0 if args.compare else 0.1)
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=16)  # labels with -100
    batches = pipecompile.data.batches(encoded(train), args.batch, shuffle=True, collate_fn=collate)
    steps = args.epochs * len(batches)
    training = {
        "dp": args.dp,
        "microbatches": 4,
        "optimizer": partial(AdamW, lr=args.lr),
        "lr_scheduler": partial(
            get_cosine_schedule_with_warmup,
            num_warmup_steps=steps // 10,
            num_training_steps=steps,
        ),
        "max_grad_norm": 1.0,
    }
    pipe = pipecompile.compile(model, args.stages, **training)
    loader = pipe.loader(batches)
    held_out = pipe.loader(encoded(validation), 50, collate_fn=collate)
    losses, seen = [], []
    for epoch in range(1, args.epochs + 1):
        for batch in tqdm(loader, desc=f"epoch {epoch}", disable=not pipe.is_main):
            losses.append(pipe.step(batch))
            seen.append(batch)
        result = pipe.evaluate(held_out, metrics={"letters": right})
        if pipe.is_main:
            print(f"epoch {epoch}: validation loss {result['loss']:.4f}", end=", ")
            print(f"{result['letters']:.1%} of the letters right")

    plain = build(args.model, tokenizer, args.width, args.layers, 0.0) if pipe.is_main else None
    if pipe.load_into(plain):
        inputs = tokenizer(validation[:4], return_tensors="pt", padding=True)
        made = plain.eval().generate(**inputs, max_new_tokens=40, num_beams=1, do_sample=False)
        for name, line in zip(validation, tokenizer.batch_decode(made, True), strict=False):
            print(f"  {name} -> {line}")
    if args.compare:
        compare(pipe, model, seen, losses, **training)


if __name__ == "__main__":
    main()

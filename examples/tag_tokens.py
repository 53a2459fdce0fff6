"""Tag the words of Python code: which is a keyword, a name that is defined, called, an attribute?

Token classification as it is done for named entities: the words of a line of code, as the standard
library's `tokenize` sees them, are cut into sub-tokens, of which the first carries the word's tag
and the others -100. Precision, recall and F1 of each tag after each epoch.

    python examples/tag_tokens.py
    torchrun --nproc-per-node 2 examples/tag_tokens.py
    python examples/tag_tokens.py --compare --train 100 --epochs 1
"""

import io
import keyword
import tokenize
from collections.abc import Iterator
from functools import partial

import pipecompile
from common.compare import compare
from common.options import parser, settle
from common.text import sources, train_tokenizer
from sklearn.metrics import classification_report
from torch.optim import AdamW
from tqdm import tqdm
from transformers import BertConfig, BertForTokenClassification, DataCollatorForTokenClassification

TAGS = ("other", "keyword", "defined", "called", "attribute", "name", "string", "number")
LONGEST = 96  # sub-tokens
WORDS = 24  # in a row


def tag(before: str, word: tokenize.TokenInfo, after: str) -> str:
    """By the word's kind and its neighbours; the model has to see these too."""
    if word.type == tokenize.STRING:
        return "string"
    if word.type == tokenize.NUMBER:
        return "number"
    if word.type != tokenize.NAME:
        return "other"
    if keyword.iskeyword(word.string):
        return "keyword"
    if before in ("def", "class"):
        return "defined"
    if after == "(":
        return "called"
    return "attribute" if before == "." else "name"


def tagged(package: str) -> Iterator[tuple[list[str], list[int]]]:
    """Rows of words, and of their tags."""
    for path in sources(package):
        found = tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)
        words = [t for t in found if t.string.strip() and t.type != tokenize.COMMENT]
        texts = ["", *(word.string for word in words), ""]
        tags = [
            TAGS.index(tag(before, word, after))
            for before, word, after in zip(texts, words, texts[2:], strict=False)
        ]
        for start in range(0, len(words) - WORDS, WORDS):
            yield texts[1 + start :][:WORDS], tags[start:][:WORDS]


def with_labels(tokenizer, rows):
    """Sub-tokens and their labels: the word's tag on its first one, -100 on the others."""
    encoded = tokenizer(
        [words for words, _ in rows], is_split_into_words=True, truncation=True, max_length=LONGEST
    )
    found = []
    for i, (_, tags) in enumerate(rows):
        of = encoded.word_ids(i)
        first = [word is not None and word not in of[:at] for at, word in enumerate(of)]
        labels = [tags[w] if new else -100 for w, new in zip(of, first, strict=True)]
        found.append({"input_ids": encoded["input_ids"][i], "labels": labels})
    return found


def report(labels, predicted):
    return classification_report(
        labels, predicted, labels=range(len(TAGS)), target_names=TAGS, digits=3, zero_division=0
    )


def kept(output, batch):
    """Labels and predictions of the words, of which there are fewer than sub-tokens."""
    there = batch["labels"] != -100
    return batch["labels"][there], output.logits.argmax(-1)[there]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--train", type=int, default=2000, help="rows of 24 words")
    arguments.add_argument("--validation", type=int, default=200)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--lr", type=float, default=2e-3)
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--width", type=int, default=64)
    args = arguments.parse_args()
    settle(args.seed)

    train = list(tagged("email"))[: args.train]
    validation = list(tagged("logging"))[: args.validation]  # another author's code
    tokenizer = train_tokenizer((word for words, _ in train for word in words), size=1000)
    dropout = 0.0 if args.compare else 0.1
    model = BertForTokenClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            intermediate_size=4 * args.width,
            initializer_range=args.width**-0.5,  # 0.02 is that of wide models
            max_position_embeddings=LONGEST,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=len(TAGS),
        )
    )
    training = {
        "dp": args.dp,
        "microbatches": 4,
        "optimizer": partial(AdamW, lr=args.lr),
        "max_grad_norm": 1.0,
    }
    pipe = pipecompile.compile(model, args.stages, **training)
    collate = DataCollatorForTokenClassification(tokenizer)  # pads labels with -100
    loader = pipe.loader(
        with_labels(tokenizer, train), args.batch, shuffle=True, collate_fn=collate
    )
    held_out = pipe.loader(with_labels(tokenizer, validation), 50, collate_fn=collate)
    losses, seen = [], []
    for epoch in range(1, args.epochs + 1):
        for batch in tqdm(loader, desc=f"epoch {epoch}", disable=not pipe.is_main):
            losses.append(pipe.step(batch))
            seen.append(batch)
        found = pipe.evaluate(held_out, metrics={"report": pipecompile.Collected(kept, report)})
        if pipe.is_main:
            print(f"epoch {epoch}: validation loss {found['loss']:.4f}\n{found['report']}")
    if args.compare:
        compare(pipe, model, seen, losses, **training)


if __name__ == "__main__":
    main()

"""Pre-train a GPT-2 on a stream of text in shards, with validation, and resume in mid-epoch.

Tokens lie in files of two bytes each, which every process maps and none copies; a process whose
stages read nothing of a batch maps none. SIGTERM, SIGUSR1 or --stop-after ends a run after a
step, whose position is saved with the weights; the same command goes on from there.

    python examples/pretrain_stream.py --out /tmp/run --stop-after 15
    python examples/pretrain_stream.py --out /tmp/run                   # the rest
    torchrun --nproc-per-node 2 examples/pretrain_stream.py --out /tmp/other --compare
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pipecompile
import torch
from common.compare import compare
from common.options import parser, settle
from common.text import sources, train_tokenizer
from pipecompile import callbacks
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel, get_constant_schedule_with_warmup

SEQ = 64  # tokens in a row
PACKAGES = ("asyncio", "email", "logging")  # a shard of each; the last is for validation


def shards(folder: Path, size: int) -> list[Path]:
    """A file of tokens per package. The first process of a machine writes them, once."""
    found = [folder / f"{package}-{size}.bin" for package in PACKAGES]
    if os.environ.get("LOCAL_RANK", "0") == "0" and not all(map(Path.exists, found)):
        folder.mkdir(parents=True, exist_ok=True)
        texts = [[p.read_text("utf-8") for p in sources(package)] for package in PACKAGES]
        tokenizer = train_tokenizer(texts[0], size)
        for shard, files in zip(found, texts, strict=True):
            ids = np.concatenate([tokenizer(text)["input_ids"] for text in files])
            ids.astype(np.uint16).tofile(shard.with_suffix(".new"))
            shard.with_suffix(".new").rename(shard)  # whole, or not there
    while not all(map(Path.exists, found)):
        time.sleep(0.1)
    return found


class TokenStream:
    """Batches of a pass over shards: rows of SEQ tokens, one shard after the other.

    Knows its position, which holds for any number of replicas; ``rows_read`` counts what this
    process has taken from the files.

    Args:
        batch: rows of all replicas together; what is left of a shard at its end is dropped.
        pipe: says which rows are this process's, and whether it needs any.
    """

    def __init__(self, shards: list[Path], batch: int, pipe: pipecompile.Pipeline):
        self.shards, self.batch, self.pipe = shards, batch, pipe
        self.epoch = self.position = self.rows_read = 0

    def __len__(self) -> int:
        return sum(self._batches(shard) for shard in self.shards)

    def _batches(self, shard: Path) -> int:
        return shard.stat().st_size // 2 // (self.batch * SEQ)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor] | None]:
        places = [(shard, i) for shard in self.shards for i in range(self._batches(shard))]
        for shard, number in places[self.position :]:
            self.position += 1
            yield self.read(shard, number) if self.pipe.needs_data else None
        self.epoch, self.position = self.epoch + 1, 0

    def read(self, shard: Path, number: int) -> dict[str, torch.Tensor]:
        """This process's rows of a batch: all that is ever copied of a file."""
        tokens = np.memmap(shard, np.uint16, mode="r")
        mine = self.batch // self.pipe.data_shards
        start = (number * self.batch + mine * self.pipe.data_shard) * SEQ
        rows = torch.from_numpy(tokens[start : start + mine * SEQ].astype(np.int64)).view(mine, SEQ)
        self.rows_read += mine
        return {"input_ids": rows, "labels": rows}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "pretrained")
    arguments.add_argument("--epochs", type=int, default=1)
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--shards", type=int, default=2, help="that are trained on")
    arguments.add_argument("--validate-every", type=int, default=50, metavar="STEPS")
    arguments.add_argument("--stop-after", type=int, metavar="STEPS", help="by a SIGUSR1 in time")
    arguments.add_argument("--vocabulary", type=int, default=1000)
    arguments.add_argument("--lr", type=float, default=2e-3)
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--width", type=int, default=64)
    args = arguments.parse_args()
    if args.batch % args.dp:
        arguments.error(f"--batch {args.batch} cannot be shared by --dp {args.dp} replicas")
    settle(args.seed)

    *train, held_out = shards(args.out / "tokens", args.vocabulary)
    train = train[: args.shards]
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = {"n_embd": args.width, "n_layer": args.layers, "n_head": 4, "n_positions": SEQ}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=args.vocabulary, **shape, **rates, bos_token_id=0, eos_token_id=0)
    )
    training = {
        "dp": args.dp,
        "microbatches": 4,
        "optimizer": partial(AdamW, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1),
        "lr_scheduler": partial(get_constant_schedule_with_warmup, num_warmup_steps=20),
        "max_grad_norm": 1.0,
    }
    pipe = pipecompile.compile(model, args.stages, **training)
    pipe.callbacks.append(callbacks.Console(every=args.validate_every))
    rows = torch.zeros(args.batch // pipe.data_shards, SEQ, dtype=torch.long)
    pipe.compile_for({"input_ids": rows, "labels": rows})  # who needs data is known from here on

    stream = TokenStream(train, args.batch, pipe)
    validation = TokenStream([held_out], args.batch, pipe)
    if (args.out / "latest").exists():
        pipe.load(args.out, data=stream)
        if pipe.is_main:
            print(f"goes on in epoch {stream.epoch}, after batch {stream.position}")
    stop, losses = pipecompile.Preemption(), []
    while stream.epoch < args.epochs and not stop.requested:
        for batch in stream:
            if pipe.is_main and pipe.steps + 1 == args.stop_after:
                signal.raise_signal(signal.SIGUSR1)
            losses.append(pipe.step(batch))
            if stop.requested:
                break
            if pipe.steps % args.validate_every == 0:
                pipe.evaluate(validation)  # which the callback prints
    if losses:
        pipe.save(args.out, data=stream, keep=2)
    if pipe.is_main:
        why = f"stopped by {stop.reason}" if stop.requested else "done"
        print(f"{why} after step {pipe.steps} of {args.epochs * len(stream)}")
    print(f"process {os.environ.get('RANK', 0)} has read {stream.rows_read} rows to train")
    if args.compare and losses:  # from the beginning, also what another run has done
        passes = (TokenStream(train, args.batch, pipe) for _ in range(args.epochs))
        batches = list(islice(chain.from_iterable(passes), pipe.steps))
        compare(pipe, model, batches, losses, **training)


if __name__ == "__main__":
    main()

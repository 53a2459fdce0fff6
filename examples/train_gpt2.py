"""Train a small GPT-2 on the text of Python's own documentation: 2 stages × 2 replicas.

torchrun --nproc-per-node 4 examples/train_gpt2.py     # four processes
python examples/train_gpt2.py                          # one process, the same numbers
"""

import argparse
import math
from collections.abc import Iterator
from functools import partial
from pydoc_data.topics import topics

import pipecompile
import torch
from pipecompile import callbacks
from rich.console import Console
from rich.table import Table
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, logging

SEQ, BATCH = 128, 16  # bytes in a row, rows in a global batch
WARMUP = 20  # steps
PROMPT = "The value of the expression "


def read_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes for training, and the last twentieth for evaluation."""
    data = torch.tensor(list("".join(topics.values()).encode()))
    cut = len(data) * 19 // 20
    return data[:cut], data[cut:]


def sample(text: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Random rows, (BATCH, SEQ) per step, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(text) - SEQ, (BATCH,), generator=generator)
        yield torch.stack([text[start : start + SEQ] for start in starts])


def share(rows: torch.Tensor, pipe: pipecompile.Pipeline) -> dict[str, torch.Tensor]:
    """This process's part of a global batch; the model shifts the labels itself."""
    mine = rows.chunk(pipe.data_shards)[pipe.data_shard]
    return {"input_ids": mine, "labels": mine}


def warmup_cosine(step: int, steps: int) -> float:
    rise = min(1.0, (step + 1) / WARMUP)
    return rise * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def plan_table(plan: pipecompile.Plan) -> Table:
    title = f"{plan.model}, {plan.param_count:,} parameters: {plan.n_stages} stages × dp {plan.dp}"
    table = Table("stage", "holds", "parameters", "stash, MiB", title=title, title_justify="left")
    for stage in plan.stages:
        stash = f"{stage.stash_bytes * stage.in_flight / 2**20:.1f}"
        table.add_row(str(stage.stage), ", ".join(stage.modules), f"{stage.param_count:,}", stash)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT-2 on Python's documentation.")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--dp", type=int, default=2)
    args = parser.parse_args()

    logging.set_verbosity_error()  # GPT-2 warns about its own default loss
    torch.manual_seed(0)
    torch.set_num_threads(1)  # per process; equal numbers need equal threads
    text, held_out = read_text()
    shape = {"n_embd": args.width, "n_layer": args.layers, "n_head": 4, "n_positions": SEQ}
    config = GPT2Config(vocab_size=256, **shape, bos_token_id=None, eos_token_id=None)
    curve = callbacks.Curve()
    pipe = pipecompile.compile(
        GPT2LMHeadModel(config),
        n_stages=args.stages,
        dp=args.dp,
        microbatches=4,
        optimizer=partial(AdamW, lr=1e-3, weight_decay=0.1),
        lr_scheduler=partial(LambdaLR, lr_lambda=partial(warmup_cosine, steps=args.steps)),
        max_grad_norm=1.0,
        callbacks=[callbacks.Console(total=args.steps), curve],  # one live line; a picture
    )
    console = Console(quiet=not pipe.is_main)
    console.print(plan_table(pipe.compile_for(share(text[: BATCH * SEQ].view(BATCH, SEQ), pipe))))

    for step, rows in enumerate(sample(text, args.steps), 1):
        loss = pipe.step(share(rows, pipe))
        if step == 1 or step % 50 == 0 or step == args.steps:
            console.print(f"step {step:3d}  loss {loss:.6f}")

    console.print(f"\n{curve}\n", highlight=False)
    batches = held_out[: len(held_out) // (BATCH * SEQ) * (BATCH * SEQ)].view(-1, BATCH, SEQ)
    held_out_loss = pipe.evaluate(share(rows, pipe) for rows in batches)
    console.print(f"held-out text: loss {held_out_loss:.6f}")

    plain = GPT2LMHeadModel(config)  # an ordinary model again
    plain.load_state_dict(pipe.state_dict(), strict=True)
    prompt = torch.tensor([list(PROMPT.encode())])
    line = plain.eval().generate(
        prompt, max_new_tokens=72, do_sample=True, temperature=0.5, pad_token_id=0
    )
    console.print(" ".join(bytes(line[0].tolist()).decode(errors="replace").split()))


if __name__ == "__main__":
    main()

"""Train through lost processes: kill any worker at any time, and the losses go on.

torchrun --standalone --nproc-per-node 4 --max-restarts 9 examples/elastic.py
kill -9 `pgrep -f examples/elastic.py | tail -1`     # meanwhile, elsewhere

On several machines, or with several agents on one:

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun --nnodes=1:4 --max-restarts=9 --rdzv-backend=c10d --rdzv-id=mine \
    --rdzv-endpoint=HOST:29400 --rdzv-conf=last_call_timeout=5 examples/elastic.py
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pydoc_data.topics import topics

import torch
from pipecompile import Pipeline, elastic
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR
from transformers import GPT2Config, GPT2LMHeadModel, logging

SEQ, BATCH = 64, 16  # bytes in a row, rows in a global batch
MICROBATCHES = 8  # of all replicas together: two rows each, whatever the processes


def read_text() -> torch.Tensor:
    return torch.tensor(list("".join(topics.values()).encode()))


def rows_of(text: torch.Tensor, step: int) -> torch.Tensor:
    """The global batch of a step, (BATCH, SEQ)."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - SEQ, (BATCH,), generator=generator)
    return torch.stack([text[start : start + SEQ] for start in starts])


def batch_of(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": rows, "labels": rows}


def trained(
    session: elastic.Session, pipe: Pipeline, text: torch.Tensor, steps: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Step and loss, of those that are left."""
    for step in session.steps(steps):
        mine = rows_of(text, step).chunk(pipe.data_shards)[pipe.data_shard]
        yield step, pipe.step(batch_of(mine))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small GPT-2 through lost processes.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--stages", type=int, nargs=2, default=(1, 2), help="fewest and most")
    parser.add_argument("--dir", help="of checkpoints; without, there is only memory")
    parser.add_argument("--save-every", type=int, help="steps")
    parser.add_argument("--timeout", type=float, default=60.0, help="of a stall, in seconds")
    args = parser.parse_args()

    logging.set_verbosity_error()  # GPT-2 warns about its own default loss
    torch.manual_seed(0)
    torch.set_num_threads(1)  # per process; equal numbers need equal threads
    text = read_text()
    shape = {"n_embd": args.width, "n_layer": args.layers, "n_head": 4, "n_positions": SEQ}
    config = GPT2Config(vocab_size=256, **shape, bos_token_id=None, eos_token_id=None)
    with elastic.Session(args.dir, save_every=args.save_every) as session:
        pipe = session.compile(
            GPT2LMHeadModel(config),
            n_stages=tuple(args.stages),
            global_microbatches=MICROBATCHES,
            example_batch=batch_of(rows_of(text, 0)),
            optimizer=partial(AdamW, lr=1e-3),
            lr_scheduler=partial(LinearLR, end_factor=0.1, total_iters=args.steps),
            max_grad_norm=1.0,
            timeout_s=args.timeout,
        )
        for step, loss in trained(session, pipe, text, args.steps):
            if pipe.is_main:
                print(f"step {step:3d}  loss {loss:.9f}  at {time.time():.3f}", flush=True)


if __name__ == "__main__":
    main()

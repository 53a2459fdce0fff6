"""What compression makes of losses, bytes and steps on slow links. Prints Markdown.

`make compress-table` runs it: a GPT-2 on the text of Python's own documentation. For the tables of
embeddings it has a large one beside its bytes: of each byte and the two before it a row is looked
up by their hash.

Losses: 300 steps on two replicas which one process plays, for it has the bits of two processes.
Steps: two processes on two machines, made of namespaces, a token bucket on each end of the cable
between them; medians. It needs root for that; else that part is left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean, median
from typing import Any

import pipecompile
import torch
import torch.distributed as dist
import transformers as hf

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import hosts
from support.gang import free_port

GRADIENTS = ("off", "bf16", "int8", "powersgd:4", "adacomp:512", "adacomp:64")
SHOWN = (1, 50, 100, 200, 300)  # steps
VALUES = ("off", "bf16", "int8")
EMBEDDINGS = ("off", "exchange", "step", "int8", "int8+exchange")
"""What `sparse_embeddings` is, and after what gradients are compressed by."""
USUAL = {"gradients": GRADIENTS, "values": VALUES, "embeddings": EMBEDDINGS}
HASHES = 1 << 15  # rows of the large table
HEADS, BYTES, SEQ, ROWS = 4, 256, 64, 8
LEARNS, STEPS_OF = (128, 2), (256, 4)  # width and layers: of the losses, of the steps
STEPS, LAST, HELD = 300, 20, 16  # LAST: of the final loss; HELD: batches of text not trained on
WARM, TIMED = 2, 5
SPEEDS = (1000, 100)  # Mbit/s
PORT, LIMIT_S = "eth0", 500


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes for training, and the last twentieth."""
    data = torch.tensor(list("".join(topics.values()).encode()))
    cut = len(data) * 19 // 20
    return data[:cut], data[cut:]


def sample(data: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    """Random rows, (ROWS, SEQ) each."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        starts = torch.randint(len(data) - SEQ, (ROWS,), generator=generator)
        yield torch.stack([data[start : start + SEQ] for start in starts])


def share(rows: torch.Tensor, pipe: Any) -> dict[str, torch.Tensor]:
    mine = rows.chunk(pipe.data_shards)[pipe.data_shard]
    return {"input_ids": mine, "labels": mine}


class Hashed(torch.nn.Module):
    """A GPT-2 over bytes, to each of which a row of a large table is added."""

    def __init__(self, inner: Any, width: int):
        super().__init__()
        self.inner = inner
        self.table = torch.nn.Embedding(HASHES, width)
        torch.nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        before = torch.nn.functional.pad(input_ids, (2, 0))  # (rows, SEQ + 2)
        hashed = (before[:, :-2] * BYTES + before[:, 1:-1]) * BYTES + input_ids
        found = self.table(hashed * 40503 % HASHES) + self.inner.transformer.wte(input_ids)
        return self.inner(inputs_embeds=found, labels=labels)


def pipeline(what: str, method: str, width: int, layers: int) -> Any:
    """Of two replicas, or for values of two stages."""
    torch.manual_seed(0)
    shape = {"n_embd": width, "n_layer": layers, "n_head": HEADS, "n_positions": SEQ}
    config = hf.GPT2Config(vocab_size=BYTES, **shape, bos_token_id=None, eos_token_id=None)
    model: Any = hf.GPT2LMHeadModel(config)
    optimizer: Any = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    options: dict[str, Any] = {"compress": {what: method}}
    if what == "embeddings":
        model, (compress, _, rows) = Hashed(model, width), method.rpartition("+")
        rows, compress = ("off", rows) if rows == "int8" else (rows, compress or "off")
        options = {"sparse_embeddings": rows, "compress": compress}
        if rows == "step":
            lazy = functools.partial(torch.optim.SparseAdam, lr=1e-3)
            optimizer = pipecompile.Several(("table.*", lazy), ("*", optimizer))
    rise = functools.partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.05, total_iters=20)
    n_stages, dp = (2, 1) if what == "values" else (1, 2)
    return pipecompile.compile(
        model,
        n_stages,
        dp=dp,
        microbatches=2 if n_stages > 1 else 1,
        optimizer=optimizer,
        lr_scheduler=rise,
        max_grad_norm=1.0,
        costs="roofline",
        seed=0,
        **options,
    )


def curve(what: str, method: str, steps: int) -> tuple[list[float], float, float, float]:
    """The losses of steps, that of other text, and bytes that a rank sends per step: those of the
    whole run, and those that the plan says."""
    pipe = pipeline(what, method, *LEARNS)
    data, held = text()
    losses = [pipe.step(share(rows, pipe)).item() for rows in sample(data, steps)]
    after = fmean(pipe.evaluate(share(rows, pipe)).item() for rows in sample(held, HELD))
    grads = pipe._require().state.ranks[0].grads
    counted = [each.sent_bytes for each in (grads.compressed, grads.touched) if each is not None]
    planned = planned_bytes(pipe)
    if not counted:
        return losses, after, planned, planned
    whole = 0 if grads.compressed is not None else mean_bytes(grads.buffers.values())
    return losses, after, sum(counted) / steps + whole, planned


def mean_bytes(buffers: Iterable[torch.Tensor]) -> int:
    """What one of two replicas gives the other of buffers that travel whole."""
    return sum(buffer.nbytes for buffer in buffers)


def losses_table(what: str, methods: Sequence[str], steps: int) -> None:
    marks = [step for step in SHOWN if step <= steps]
    shown = " | ".join(f"step {m}" for m in marks)
    print(f"\n| {what} | {shown} | last {LAST} | held out | MB | planned |")
    print(f"|---|{'--:|' * (len(marks) + 4)}")
    for method in methods:
        losses, held, sent, planned = curve(what, method, steps)
        near = [f"{fmean(losses[max(0, m - 10) : m]):.3f}" for m in marks]
        near += [f"{fmean(losses[-LAST:]):.4f}", f"{held:.4f}"]
        near += [f"{sent / 1e6:.3f}", f"{planned / 1e6:.3f}"]
        print(f"| {method} | {' | '.join(near)} |", flush=True)


# -- between namespaces -------------------------------------------------------------------------


def worker(what: str, methods: Sequence[str]) -> None:
    """Rank 0's last line: per method [seconds of a step, bytes, those of the link, planned]."""
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = []
    for method in methods:
        pipe = pipeline(what, method, *STEPS_OF)
        batches = [share(rows, pipe) for rows in sample(text()[0], WARM + TIMED)]
        for batch in batches[:WARM]:
            pipe.step(batch)
        seconds, transport = [], pipe._world.transport
        before = transport.sent_bytes, sent_on(PORT)
        for batch in batches[WARM:]:
            dist.barrier()
            start = time.perf_counter()
            pipe.step(batch)
            dist.barrier()
            seconds.append(time.perf_counter() - start)
        after = transport.sent_bytes, sent_on(PORT)
        sent = [(now - then) / TIMED for now, then in zip(after, before, strict=True)]
        found.append([median(seconds), *sent, planned_bytes(pipe)])
        dist.barrier()
    print(json.dumps(found), flush=True)


def sent_on(port: str) -> int:
    """Bytes that have left through a port of this machine, headers and all."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == port:
            return int(counts.split()[8])
    raise LookupError(port)


def on_both(machines: Sequence[hosts.Host], arguments: Sequence[str]) -> Any:
    """This file on two machines, as ranks 0 and 1; the last line of rank 0, as JSON.

    Raises:
        RuntimeError: with what one of them has said.
    """
    met = {"MASTER_ADDR": machines[0].address, "MASTER_PORT": str(free_port())}
    met |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    workers = [
        subprocess.Popen(
            each.command([sys.executable, __file__, *arguments]),
            env=os.environ | met | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, each in enumerate(machines)
    ]
    try:
        told = [each.communicate(timeout=LIMIT_S) for each in workers]
    finally:
        for each in workers:
            each.kill()
    for each, (_, errors) in zip(workers, told, strict=True):
        if each.returncode:
            raise RuntimeError(errors[-3000:])
    return json.loads(told[0][0].strip().splitlines()[-1])


def planned_bytes(pipe: Any) -> int:
    """What rank 0 sends per step, to other replicas or to the next stage."""
    if pipe.plan.dp > 1:
        return int(pipe.plan.stages[0].exchanged_bytes)
    return int(sum(m.bytes for m in pipe.plan.stages[0].sends) * pipe.plan.microbatches)


def steps_table(what: str, methods: Sequence[str], speeds: Sequence[int]) -> None:
    if why := hosts.lacking():
        print(f"\nno namespaces here, so no steps on slow links: {why}")
        return
    found = {}
    for speed in speeds:
        with hosts.network(2) as made:
            made.throttle(made.hosts[1], speed * 10**6 // 8)
            found[speed] = on_both(made.hosts, ["--worker", what, "--methods", ",".join(methods)])
    names = [f"{s / 1000:g} Gbit/s" if s >= 1000 else f"{s} Mbit/s" for s in speeds]
    print(
        f"\n| {what} | MB sent | planned | on the link | {' | '.join(f'{n} | × ' for n in names)} |"
    )
    print(f"|---|{'--:|' * (3 + 2 * len(speeds))}")
    for i, method in enumerate(methods):
        _, sent, linked, planned = found[speeds[0]][i]
        cells = [f"{each / 1e6:.3f}" for each in (sent, planned, linked)]
        for speed in speeds:
            seconds, whole = found[speed][i][0], found[speed][0][0]
            cells += [f"{seconds:.3f} s", f"{whole / seconds:.1f}"]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses, bytes and steps with compress=.")
    parser.add_argument("--what", choices=tuple(USUAL), action="append")
    parser.add_argument("--part", choices=("losses", "steps"), action="append")
    parser.add_argument("--methods", help="separated by commas; the first is compared with")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.methods.split(","))
        return
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for what in args.what or USUAL:
        methods = args.methods.split(",") if args.methods else USUAL[what]
        for part in args.part or ("losses", "steps"):
            if part == "losses":
                losses_table(what, methods, args.steps)
            else:
                steps_table(what, methods, SPEEDS)


if __name__ == "__main__":
    main()

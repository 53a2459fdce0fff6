"""What backend="inductor" brings in one process: tokens per second beside torch.compile.

Markdown on stdout. One thread; models of about 8 layers of width 256, without dropout, AdamW, batch
16 × 128 in 8 microbatches. Contenders take turns, so that what else the machine does meets all; a
figure is the median over the rounds, a ratio the median of the rounds' ratios.

    python tests/bench/backend_table.py [gpt2|llama|bert ...] [--dtypes fp32,bf16] [--rounds 15]
    python tests/bench/backend_table.py --compiling 4,24
    python tests/bench/backend_table.py [gpt2|llama|bert ...] --memory

The second prints how long a stage of so many layers takes to compile, with nothing kept on disk;
the third what a step holds at most, planned and measured, of the models of `models.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("PIPECOMPILE_COSTS", "roofline")  # one stage: there is nothing to choose
os.environ.setdefault("PIPECOMPILE_CACHE", "off")  # the first step is to be the first

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

import pipecompile
import torch
import transformers as hf
from bench import models
from support import measured as meter
from torch import nn

LENGTH, ROWS, MICROBATCHES, WORDS = 128, 16, 8, 4096
ADAMW = partial(torch.optim.AdamW, lr=3e-4)


def gpt2(layers: int = 8) -> nn.Module:
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes: dict[str, Any] = {"n_embd": 256, "n_head": 8, "n_positions": LENGTH}
    known = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=layers, **sizes, **known, **rates))


def llama(layers: int = 8) -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            num_hidden_layers=layers,
            hidden_size=256,
            intermediate_size=688,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=WORDS,
            use_cache=False,
        )
    )


def bert(layers: int = 8) -> nn.Module:
    return hf.BertForMaskedLM(
        hf.BertConfig(
            num_hidden_layers=layers,
            hidden_size=256,
            intermediate_size=1024,
            num_attention_heads=8,
            vocab_size=WORDS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def plain(name: str, dtype: str, compiled: bool) -> Callable[[], Any]:
    """A loop that accumulates gradients over the same microbatches."""
    model = build(name)
    optimizer = ADAMW(model.parameters())
    run = torch.compile(model) if compiled else model
    pieces = {k: v.chunk(MICROBATCHES) for k, v in batch().items()}
    mixed = torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext()

    def step() -> float:
        total = 0.0
        for i in range(MICROBATCHES):
            with mixed:
                loss = run(**{k: v[i] for k, v in pieces.items()}).loss / MICROBATCHES
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def ours(name: str, dtype: str, backend: str) -> Callable[[], Any]:
    pipe = pipecompile.compile(
        build(name),
        1,
        microbatches=MICROBATCHES,
        optimizer=ADAMW,
        backend=backend,
        precision="bf16" if dtype == "bf16" else None,
    )
    return lambda: float(pipe.step(batch()))


CONTENDERS: dict[str, Callable[[str, str], Callable[[], Any]]] = {
    "eager": partial(plain, compiled=False),
    "torch.compile": partial(plain, compiled=True),
    "ours, eager": partial(ours, backend="eager"),
    "ours, inductor": partial(ours, backend="inductor"),
}
"""What makes a step of a model and a dtype."""


def taking_turns(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round."""
    seconds: dict[str, list[float]] = {who: [] for who in steps}
    for _ in range(rounds):
        for who, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[who].append(time.perf_counter() - start)
    return seconds


def faster(seconds: dict[str, list[float]], who: str, than: str) -> float:
    """How many times: the median of the rounds' ratios."""
    return median(t / m for t, m in zip(seconds[than], seconds[who], strict=True))


def measured(name: str, dtype: str, rounds: int) -> str:
    """One row of the table."""
    steps = {who: make(name, dtype) for who, make in CONTENDERS.items()}
    first_s, losses = {}, {}
    for who, step in steps.items():
        start = time.perf_counter()
        losses[who] = step()
        first_s[who] = time.perf_counter() - start
        step()
    seconds = taking_turns(steps, rounds)
    spread = max(losses.values()) - min(losses.values())
    assert spread < (1e-4 if dtype == "fp32" else 3e-2), losses  # they train the same thing
    speeds = [f"{ROWS * LENGTH / median(seconds[who]):,.0f}" for who in CONTENDERS]
    ratio = faster(seconds, "ours, inductor", than="torch.compile")
    waits = f"{first_s['ours, inductor']:.0f} / {first_s['torch.compile']:.0f} s"
    return f"| {name} | {dtype} | {' | '.join(speeds)} | **{ratio:.2f}×** | {waits} |"


def remembering(name: str, dtype: str, remat: str) -> str:
    """One row: MB at a step's peak, in brackets without what is held all the time."""
    given = models.batch(ROWS)
    pipe = pipecompile.compile(
        models.build(name),
        1,
        microbatches=4,
        optimizer=ADAMW,
        backend="inductor",
        remat=remat,
        precision="bf16" if dtype == "bf16" else None,
        example_batch=given,
    )
    for _ in range(2):  # kernels keep what they make at first
        pipe.step(given)
    planned = pipe.plan.stages[0].memory.peak
    found = meter.allocated_peak(pipe, given)
    held = meter.distinct_bytes(meter.held(pipe, given))
    cells = [f"{size / 1e6:.1f} ({(size - held) / 1e6:.1f})" for size in (planned, found)]
    return f"| {name} | {dtype} | {remat} | {' | '.join(cells)} | {planned / found - 1:+.1%} |"


def compiling(layers: int) -> str:
    """One row: seconds until the first step of a stage is ready, and its fusions.

    In a process of its own, as Inductor keeps kernels in memory too.
    """
    torch.set_num_threads(1)
    torch.compile(torch.tanh)(torch.ones(8))  # what is loaded once, and looked up of the processor
    torch.manual_seed(0)
    model, seconds, notes = gpt2(layers), [], ""
    for backend in ("eager", "inductor"):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            start = time.perf_counter()
            pipe = pipecompile.compile(
                model, 1, microbatches=MICROBATCHES, optimizer=ADAMW, backend=backend
            )
            pipe.compile_for(batch())
            seconds.append(time.perf_counter() - start)
        notes = dict(pipe.plan.notes).get("fusions", "").partition(", compiled")[0]
    eager_s, fused_s = seconds
    return f"| {layers} | {eager_s:.1f} s | {fused_s:.1f} s | {fused_s - eager_s:.1f} s | {notes} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiling", default="", metavar="LAYERS", help="such as 4,24")
    parser.add_argument("--memory", action="store_true", help="bytes instead of seconds")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.compiling:
        print("| layers | compiled, eager | compiled, inductor | of it Inductor | programs |")
        print("| --- | --- | --- | --- | --- |")
        for layers in map(int, given.compiling.split(",")):
            with get_context("spawn").Pool(1) as processes:
                print(processes.apply(compiling, (layers,)), flush=True)
        return
    if given.memory:
        print("| model | dtype | remat | planned | measured | apart |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name in given.models:
            for dtype, remat in product(given.dtypes.split(","), ("none", "full")):
                print(remembering(name, dtype, remat), flush=True)
        return
    print(
        "| model | dtype | eager | torch.compile | ours, eager | ours, inductor | inductor", end=""
    )
    print(" / torch.compile | first step: ours / torch.compile |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in given.models:
        for dtype in given.dtypes.split(","):
            print(measured(name, dtype, given.rounds), flush=True)


if __name__ == "__main__":
    main()

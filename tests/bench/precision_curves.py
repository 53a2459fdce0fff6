"""Does training in bf16 and fp16 learn what fp32 learns? Prints Markdown.

`make precision-curves` runs it: a GPT-2 and a Llama on the text of Python's own documentation,
two stages, several seeds. A seed chooses the initial weights; the data are the same for all. How
far the curves of two seeds in fp32 are apart is what a difference has to be compared with.

Two runs at a time, a process of one thread each, which plays both stages: the same numbers as in
two processes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, pstdev

import pipecompile
import torch
import transformers as hf

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train_gpt2 as example

STEPS, LAST, SEEDS = 200, 20, range(3)
PRECISIONS = ("fp32", "bf16", "fp16")
WIDTH, LAYERS, HEADS, BYTES = 128, 3, 4, 256


def gpt2() -> torch.nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=BYTES,
            n_positions=example.SEQ,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def llama() -> torch.nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=BYTES,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


MODELS: dict[str, Callable[[], torch.nn.Module]] = {"GPT-2": gpt2, "Llama": llama}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        losses: of every step.
        held_out: mean loss on text that was not trained on.
        skipped, scale: of the loss scaler, with fp16.
    """

    losses: Sequence[float]
    held_out: float
    skipped: int = 0
    scale: float | None = None

    @property
    def final(self) -> float:
        return fmean(self.losses[-LAST:])


def train(name: str, precision: str, seed: int, steps: int) -> Run:
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    text, held_out = example.read_text()
    schedule = functools.partial(example.warmup_cosine, steps=steps)
    pipe = pipecompile.compile(
        MODELS[name](),
        n_stages=2,
        microbatches=4,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=schedule),
        max_grad_norm=1.0,
        seed=seed,
        costs="roofline",
        precision=precision,
    )
    losses = [pipe.step(example.share(rows, pipe)).item() for rows in example.sample(text, steps)]
    rows = len(held_out) // (example.BATCH * example.SEQ) * example.BATCH
    batches = held_out[: rows * example.SEQ].view(-1, example.BATCH, example.SEQ)
    held = fmean(pipe.evaluate(example.share(batch, pipe)).item() for batch in batches)
    scaler = pipe.loss_scaler
    return Run(losses, held) if scaler is None else Run(losses, held, scaler.skipped, scaler.scale)


def _apart(pairs: Iterable[tuple[Run, Run]]) -> tuple[float, float]:
    """How far curves are apart: mean over steps and pairs, and the most."""
    gaps = [
        abs(a - b) for one, other in pairs for a, b in zip(one.losses, other.losses, strict=True)
    ]
    return fmean(gaps), max(gaps)


def _row(label: str, runs: Sequence[Run], pairs: Iterable[tuple[Run, Run]]) -> str:
    finals, held = [run.final for run in runs], [run.held_out for run in runs]
    mean, most = _apart(pairs)
    cells = [label, f"{fmean(finals):.4f} ± {pstdev(finals):.4f}"]
    cells += [f"{fmean(held):.4f} ± {pstdev(held):.4f}", f"{mean:.5f}", f"{most:.5f}"]
    if runs[0].scale is None:
        cells += ["", ""]
    else:
        cells.append(", ".join(str(run.skipped) for run in runs))
        cells.append(", ".join(f"{run.scale:.0f}" for run in runs))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses of fp32, bf16 and fp16.")
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    started = time.perf_counter()
    keys = list(itertools.product(MODELS, PRECISIONS, SEEDS))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        jobs = {key: pool.submit(train, *key, steps) for key in keys}
        runs = {key: job.result() for key, job in jobs.items()}
    print(
        f"{steps} steps of {example.BATCH} × {example.SEQ} bytes, {len(SEEDS)} seeds. *final*: "
        f"mean of the last {LAST} steps; ± over the seeds. *apart*: from fp32 with the same "
        "seed, step by step; for fp32 from its other seeds\n\n"
        "| model | final loss | held-out loss | mean apart | most apart | skipped steps "
        "| loss scale |\n|---|--:|--:|--:|--:|--:|--:|"
    )
    for name in MODELS:
        exact = [runs[name, "fp32", seed] for seed in SEEDS]
        print(_row(f"{name}, fp32", exact, itertools.combinations(exact, 2)))
        for precision in PRECISIONS[1:]:
            own = [runs[name, precision, seed] for seed in SEEDS]
            print(_row(f"{name}, {precision}", own, zip(own, exact, strict=True)))
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()

"""What a batch of a new length costs; `make lengths-table`.

Two models train on batches of lengths that were not met before, each in two ways: every length is
traced (``dynamic="off"``), or one graph with symbols serves them all (``"auto"``). The first step
compiles the first length in both; the second one traces the graph with symbols. "met" is a step of
a length that has a program. A second run finds on disk what the first has left. Seconds of one
process with one thread that plays all stages; of further lengths, and of those met, the medians.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

LENGTHS = (64, 96, 80, 72, 88, 104, 112, 120, 68)
STAGES, MICROBATCHES, ROWS, WORDS = 4, 4, 8, 512


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 12, "n_embd": 96, "n_head": 4, "n_positions": 128, "vocab_size": WORDS}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=8,
        hidden_size=96,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS,
    )
    return LlamaForCausalLM(config)


def seconds(make: Callable[[], Any], dynamic: str) -> tuple[list[float], list[torch.Tensor]]:
    """Of the first two lengths, of further ones, and of those met; and all losses."""
    import pipecompile
    from support import jobs

    torch.manual_seed(0)
    pipe = pipecompile.compile(
        make(),
        STAGES,
        microbatches=MICROBATCHES,
        optimizer=jobs.OPTIMIZERS["adamw"],
        dynamic=dynamic,
        seed=1,
    )
    times, losses = [], []
    for length in (*LENGTHS, *LENGTHS):
        tokens = torch.randint(
            WORDS, (ROWS, length), generator=torch.Generator().manual_seed(length)
        )
        start = time.perf_counter()
        losses.append(pipe.step({"input_ids": tokens, "labels": tokens}))
        times.append(time.perf_counter() - start)
    new, met = times[: len(LENGTHS)], times[len(LENGTHS) :]
    return [*new[:2], statistics.median(new[2:]), statistics.median(met)], losses


def main() -> None:
    torch.set_num_threads(1)
    os.environ["PIPECOMPILE_CACHE"] = "off"
    seconds(gpt2, "off")  # imports, and what torch sets up once
    print("| model | dynamic | run | first length | second | further | met |")
    print("|---|---|---|---|---|---|---|")
    for make in (gpt2, llama):
        found = {}
        for dynamic in ("off", "auto"):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["PIPECOMPILE_CACHE"] = folder
                for run in ("first", "second"):
                    found[dynamic, run] = seconds(make, dynamic)
        for (dynamic, run), (times, losses) in found.items():
            assert all(map(torch.equal, losses, found["off", "first"][1])), "the bits are others"
            shown = " | ".join(f"{each:.2f} s" for each in times)
            print(f"| {make.__name__} | {dynamic} | {run} | {shown} |")


if __name__ == "__main__":
    main()

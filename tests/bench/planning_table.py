"""What planning large models costs: CPU seconds and the most memory of one `inspect`. Prints
Markdown.

`make planning-table` runs it; names of models, and of what is asked, as arguments choose among
them. Every plan is made in a process of its own that finds nothing another one has left; the
seconds are of both user and system, with what importing torch and building the model without
weights take.

plan     what `inspect --json` does: the plan alone
verdict  what `inspect` does: also what would help most
search   what `inspect --stages auto --json` does
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

import torch
import transformers as hf
from support.llama3 import llama3
from torch import nn

ROOT = Path(__file__).parents[2]


def _tokens(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros((rows, length), dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}


def gpt2_xl() -> tuple[nn.Module, Any]:
    config = hf.GPT2Config(n_layer=48, n_embd=1600, n_head=25)
    return hf.GPT2LMHeadModel(config), _tokens(16, 1024)


def llama_8b() -> tuple[nn.Module, Any]:
    return llama3(4096, 14336, 32, 32).bfloat16(), _tokens(16, 4096)


def llama_70b() -> tuple[nn.Module, Any]:
    return llama3(8192, 28672, 80, 64).bfloat16(), _tokens(16, 4096)


def llama_70b_global() -> tuple[nn.Module, Any]:
    return llama3(8192, 28672, 80, 64).bfloat16(), _tokens(256, 4096)


def llama_405b() -> tuple[nn.Module, Any]:
    return llama3(16384, 53248, 126, 128).bfloat16(), _tokens(32, 4096)


@dataclass(frozen=True)
class Subject:
    """A model, and the flags of `inspect`."""

    title: str
    build: Callable[[], tuple[nn.Module, Any]]
    flags: str


SUBJECTS = {
    "xl": Subject("GPT-2 XL", gpt2_xl, "--stages 8 --microbatches 16"),
    "8b": Subject("Llama-3-8B", llama_8b, "--stages 4 --microbatches 16"),
    "70b": Subject("Llama-3-70B", llama_70b, "--stages 16 --microbatches 16"),
    "405b": Subject("Llama-3.1-405B", llama_405b, "--stages 16 --microbatches 32 --memory 400GiB"),
    "search": Subject(
        "Llama-3-70B", llama_70b_global, "--stages auto --devices 64 --schedule auto --zero auto"
    ),
}
WAYS = {"plan": ["--json"], "verdict": []}


def _measured(subject: Subject, more: list[str]) -> tuple[float, float, float, int]:
    """CPU seconds, seconds, GiB, and the exit status."""
    spec = f"{__file__}:{subject.build.__name__}"
    command = [sys.executable, "-m", "pipecompile", "inspect", spec, "--device", "h100"]
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"PIPECOMPILE_CACHE": cache}
        start = time.perf_counter()
        running = subprocess.Popen(
            [*command, *subject.flags.split(), *more], env=env, stdout=subprocess.DEVNULL
        )
        _, status, used = os.wait4(running.pid, 0)
        took_s = time.perf_counter() - start
    return used.ru_utime + used.ru_stime, took_s, used.ru_maxrss / 2**20, status


def main(names: list[str]) -> None:
    if unknown := set(names) - {*WAYS, *SUBJECTS}:
        raise SystemExit(f"{min(unknown)} is none of {', '.join((*SUBJECTS, *WAYS))}")
    ways = {name: WAYS[name] for name in names if name in WAYS} or WAYS
    print("| model | flags | | CPU s | s | GiB |\n| --- | --- | --- | ---: | ---: | ---: |")
    for name in [name for name in names if name in SUBJECTS] or list(SUBJECTS):
        subject = SUBJECTS[name]
        for way, more in {"search": ["--json"]}.items() if name == "search" else ways.items():
            cpu_s, took_s, peak, status = _measured(subject, more)
            failed = f" (failed: {status})" if status else ""
            figures = f"{cpu_s:.1f} | {took_s:.1f} | {peak:.2f}"
            print(
                f"| {subject.title} | `{subject.flags}` | {way}{failed} | {figures} |", flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1:])

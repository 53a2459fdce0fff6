"""What tests/gpu/figures.py measures of one contender, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import pipecompile
import torch
import transformers as hf
from torch import nn

from support.gpu_models import Size
from support.measured import peak_bytes

ADAMW = partial(torch.optim.AdamW, lr=1e-4)
ROUNDS, SECONDS = 30, 8.0  # steps that are timed: so many, or what this time allows
WARM = 3
_ACTIVITY = torch.profiler.ProfilerActivity

Step = Callable[[], torch.Tensor]


def build(size: Size) -> nn.Module:
    torch.manual_seed(0)
    if size.kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(use_cache=False, **size.config))
    return hf.LlamaForCausalLM(hf.LlamaConfig(use_cache=False, **size.config))


def batch_of(size: Size, device: str) -> dict[str, torch.Tensor]:
    """Of a step, on the device."""
    words = size.config.get("vocab_size", 50257)
    shape = (size.rows * size.microbatches, size.length)
    ids = torch.randint(words, shape, generator=torch.Generator().manual_seed(1)).to(device)
    return {"input_ids": ids, "labels": ids.clone()}


def plain(size: Size, device: str, compiled: bool) -> tuple[Step, Any]:
    """A loop that accumulates gradients over the same microbatches."""
    model = build(size).to(device)
    optimizer = ADAMW(model.parameters())
    run = torch.compile(model) if compiled else model
    pieces = {k: v.chunk(size.microbatches) for k, v in batch_of(size, device).items()}

    def step() -> torch.Tensor:
        total = torch.zeros((), device=device)
        for i in range(size.microbatches):
            with torch.autocast(device, torch.bfloat16):
                loss = run(**{k: v[i] for k, v in pieces.items()}).loss / size.microbatches
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step, None


def ours(size: Size, device: str, backend: str, graphs: bool) -> tuple[Step, Any]:
    batch = batch_of(size, device)
    options: dict[str, Any] = {"cudagraphs": True} if graphs else {}
    pipe = pipecompile.compile(
        build(size),
        1,
        microbatches=size.microbatches,
        optimizer=ADAMW,
        precision="bf16",
        device=device,
        backend=backend,
        remat="none",
        costs="profile",
        example_batch=batch,
        **options,
    )
    return lambda: pipe.step(batch), pipe


def made(size: Size, who: str, device: str) -> tuple[Step, Any]:
    """What makes a step of a contender, and its pipeline, if it has one."""
    owner, kind, *more = who.split(", ") if ", " in who else ("plain", who)
    if owner == "plain":
        return plain(size, device, kind == "torch.compile")
    return ours(size, device, kind, bool(more))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _timed(step: Step, device: str) -> float:
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def kernels_share(step: Step, device: str) -> float:
    """Of three steps, the part of their time in which kernels run; on a CPU, operators."""
    kind = _ACTIVITY.CUDA if device == "cuda" else _ACTIVITY.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        start = time.perf_counter()
        for _ in range(3):
            step()
        _wait(device)
        seconds = time.perf_counter() - start
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    busy_us = sum(getattr(event, name) for event in profiler.key_averages())
    return float(busy_us / 1e6 / seconds)


def measured(size: Size, who: str, device: str) -> dict[str, Any]:
    """By the names of `figures.COLUMNS`."""
    graphs = who.endswith("CUDA graphs")
    if graphs and device != "cuda":
        return {"error": "needs CUDA"}
    start = time.perf_counter()
    step, pipe = made(size, who, device)  # ours is compiled here, torch's in the first step
    _timed(step, device)
    first_s = time.perf_counter() - start
    for _ in range(WARM):  # CUDA graphs are recorded in the second
        _timed(step, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    until = time.perf_counter() + SECONDS
    while len(seconds) < ROUNDS and (len(seconds) < 3 or time.perf_counter() < until):
        seconds.append(_timed(step, device))
    found: dict[str, Any] = {"first_s": first_s, "step_s": median(seconds)}
    if device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    elif pipe is not None:  # what is allocated there is counted operator by operator
        found["peak_bytes"] = peak_bytes(pipe, batch_of(size, device))
    if pipe is not None:
        stage = pipe.plan.stages[0]
        found |= {"predicted_s": pipe.plan.step_s, "predicted_bytes": stage.memory.peak}
    found["kernels"] = kernels_share(step, device)
    return found

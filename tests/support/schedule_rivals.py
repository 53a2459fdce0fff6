"""Training steps in every schedule: pipecompile's, and those of torch.distributed.pipelining.

The model and the batch are those of `support.rivals`. What torch's schedules divide is written by
hand, with the layers dealt so that its slowest stage is as quick as can be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product, starmap
from typing import Any

import pipecompile
import torch
import torch.distributed as dist
from torch.distributed import pipelining

from support import rivals
from support.rivals import ADAMW, MICROBATCHES, NARROW

HEAD = 1.3  # layers
WARM_UP = 2  # steps that are not recorded


@dataclass(frozen=True)
class Ours:
    """One of pipecompile's schedules."""

    schedule: str
    virtual: int | None = None

    def __str__(self) -> str:
        several = f", {self.virtual} stages per rank" if self.virtual else ""
        return f"pipecompile {self.schedule}{several}"

    def build(self) -> Callable[[], Any]:
        pipe = _compiled(self)
        return lambda: pipe.step(rivals.batch())


@dataclass(frozen=True)
class Torchs:
    """One of torch's schedules: the name of its class, and how many stages ranks hold."""

    schedule: str
    virtual: int = 1

    def __str__(self) -> str:
        return f"torch {self.schedule}"

    def build(self) -> Callable[[], Any]:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        n = ranks * self.virtual
        mine = [rank, n - 1 - rank] if "ZBV" in self.schedule else list(range(rank, n, ranks))
        bounds = [0]
        for count in balanced(NARROW.layers, n):
            bounds.append(bounds[-1] + count)
        layers = list(starmap(range, pairwise(bounds)))
        parts = [rivals.Part(layers[s], s == 0, s == n - 1) for s in mine]
        device = torch.device("cpu")
        stages = [
            pipelining.PipelineStage(part, s, n, device)
            for s, part in zip(mine, parts, strict=True)
        ]
        made = getattr(pipelining, f"Schedule{self.schedule}")
        given = stages if self.virtual > 1 else stages[0]
        schedule = made(given, MICROBATCHES, loss_fn=rivals.next_word_loss)
        optimizer = ADAMW([p for part in parts for p in part.parameters()])

        def step() -> None:
            whole = rivals.batch()
            first = (whole["input_ids"],) if 0 in mine else ()
            last = {"target": whole["labels"], "losses": []} if n - 1 in mine else {}
            schedule.step(*first, **last)
            optimizer.step()
            optimizer.zero_grad()

        return step


@dataclass(frozen=True)
class Limit:
    """Every process runs the whole model on its share of the microbatches, and waits for nobody."""

    def __str__(self) -> str:
        return "no pipeline: all of the model, on a part of the microbatches"

    def build(self) -> Callable[[], Any]:
        return rivals.limit()


Rival = Ours | Torchs | Limit


def balanced(layers: int, stages: int) -> tuple[int, ...]:
    """How many layers each stage gets so that the slowest is as quick as can be; of those the most
    even."""
    usual = layers // stages
    near = product(range(max(usual - 1, 1), usual + 3), repeat=stages - 1)
    every = ((*some, layers - sum(some)) for some in near if sum(some) <= layers)

    def loads(counts: tuple[int, ...]) -> tuple[float, float]:
        each = [*map(float, counts[:-1]), counts[-1] + HEAD]
        return max(each), sum(x * x for x in each)

    return min(every, key=loads)


@cache
def _compiled(way: Ours) -> Any:
    return pipecompile.compile(
        rivals.model(),
        dist.get_world_size(),
        microbatches=MICROBATCHES,
        optimizer=ADAMW,
        schedule=way.schedule,
        virtual_stages=way.virtual,
    )


@cache
def _built(rival: Rival) -> Callable[[], Any]:
    return rival.build()


def step(rival: Rival) -> tuple[float, float]:
    """Seconds of one step, from when all are ready to when all are done, and this process's CPU
    seconds."""
    rivals.meet()
    run = _built(rival)
    dist.barrier()
    start, used = time.perf_counter(), time.process_time()
    run()
    used = time.process_time() - used
    dist.barrier()
    return time.perf_counter() - start, used


def traced(way: Ours, path: str, planned: str, steps: int) -> None:
    """Record steps into a file, and what was predicted into another one."""
    rivals.meet()
    pipe = _compiled(way)
    for _ in range(WARM_UP):
        pipe.step(rivals.batch())
    with pipe.trace(path, plan=planned):
        for _ in range(steps):
            pipe.step(rivals.batch())

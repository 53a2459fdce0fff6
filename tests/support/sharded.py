"""One training step on 2 stages × 2 replicas: by pipecompile, and by what else shards there.

Every process of a gang keeps its contenders between calls, as in `rivals`. All have the same
model and rows, each replica its own, and the same optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pipecompile
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from . import deepspeed_rival, rivals

STAGES, REPLICAS = 2, 2
OPTIMIZERS = {
    "adamw": rivals.ADAMW,
    # AdamW hides a gradient that is wrong by a factor, SGD does not.
    "sgd": partial(torch.optim.SGD, lr=0.1),
}

Optimizer = Callable[[Any], torch.optim.Optimizer]
Step = Callable[[], torch.Tensor | None]  # the loss, of this replica or of all, where it is known


def compiled(zero: int, optimizer: Optimizer) -> Step:
    return _step(_pipeline(optimizer, **({"zero": zero} if zero else {})))


def within(share: float, optimizer: Optimizer) -> Step:
    """Level 3, which keeps whole over a step what there is room for.

    Args:
        share: of what level 1 needs beyond level 3, both as planned. That is less than FSDP2 needs
            under 1F1B: it has whole parameters and gradients too, and the rows besides.
    """
    least, most = (_peak(_pipeline(optimizer, zero=level)) for level in (3, 1))
    memory = least + round(share * (most - least))
    pipe = _pipeline(optimizer, zero=3, memory=memory, remat="none")
    assert _peak(pipe) <= memory
    return _step(pipe)


def _pipeline(optimizer: Optimizer, **options: Any) -> Any:
    return pipecompile.compile(
        rivals.model(),
        STAGES,
        dp=REPLICAS,
        microbatches=rivals.MICROBATCHES,
        optimizer=optimizer,
        **options,
    )


def _rows() -> dict[str, torch.Tensor]:
    return rivals.batch(seed=1 + dist.get_rank() // STAGES)


def _step(pipe: Any) -> Step:
    rows = _rows()
    return lambda: pipe.step(rows)


def _peak(pipe: Any) -> int:
    pipe.compile_for(_rows())
    return max(stage.memory.peak for stage in pipe.plan.stages)


def fsdp(per_block: bool, reshard: bool, optimizer: Optimizer) -> Step:
    """Stages rewritten and balanced by hand, sharded over the replicas, under torch's 1F1B.

    Gradients stay whole, and are reduced once, after a step's last backward: torch's schedule has
    it so.

    Args:
        per_block: communicate layer by layer, as FSDP's documentation has it, or stage by stage.
        reshard: let parameters go after each forward, and not after the last backward only.
    """
    mesh = init_device_mesh("cpu", (REPLICAS, STAGES), mesh_dim_names=("dp", "pp"))
    stage, replica = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    part: Any = rivals.half(stage, rivals.NARROW.balanced)
    for module in (*(part.h if per_block else ()), part):
        fully_shard(module, mesh=mesh["dp"], reshard_after_forward=reshard)
    placed = PipelineStage(part, stage, STAGES, torch.device("cpu"), group=mesh["pp"].get_group())
    schedule = Schedule1F1B(placed, rivals.MICROBATCHES, loss_fn=rivals.next_word_loss)
    stepper = optimizer(part.parameters())
    rows = rivals.batch(seed=1 + replica)

    def step() -> torch.Tensor | None:
        losses: list[torch.Tensor] = []
        if stage == 0:
            schedule.step(rows["input_ids"])
        else:
            schedule.step(target=rows["labels"], losses=losses)
        stepper.step()
        stepper.zero_grad()
        return torch.stack(losses).detach().mean() if losses else None

    return step


OURS: dict[str, Callable[[Optimizer], Step]] = {
    **{f"pipecompile, zero={level}": partial(compiled, level) for level in range(4)},
    "pipecompile, zero=3, half kept": partial(within, 0.5),
    "pipecompile, zero=3, kept": partial(within, 1.0),
}
TORCH = {
    "torch FSDP2 per layer, 1F1B": partial(fsdp, True, False),
    "torch FSDP2 per stage, 1F1B": partial(fsdp, False, False),
    "torch FSDP2 per layer, resharding": partial(fsdp, True, True),
}
DEEPSPEED = {
    "DeepSpeed ZeRO-1, balanced by hand": partial(deepspeed_rival.pipeline, "uniform"),
    "DeepSpeed ZeRO-1, by parameters": partial(deepspeed_rival.pipeline, "parameters"),
}


def contenders() -> Mapping[str, Callable[[Optimizer], Step]]:
    """Name -> a function that sets up one training step, without those that lack their package."""
    return OURS | TORCH | (DEEPSPEED if deepspeed_rival.INSTALLED else {})


@cache
def _ready(name: str, optimizer: str) -> Step:
    return contenders()[name](OPTIMIZERS[optimizer])


@dataclass(frozen=True)
class Turn:
    """One step of one rank.

    Attributes:
        seconds: from when all ranks are ready to when all are done.
        cpu_s: that this process computed.
        loss: as this rank knows it.
    """

    seconds: float
    cpu_s: float
    loss: float | None


def step(name: str, optimizer: str = "adamw") -> Turn:
    seen: list[tuple[float, torch.Tensor | None]] = []

    def watched() -> Callable[[], None]:
        run = _ready(name, optimizer)

        def once() -> None:
            start = time.process_time()
            loss = run()
            seen.append((time.process_time() - start, loss))

        return once

    seconds = rivals.timed(watched)
    cpu_s, loss = seen[0]
    return Turn(seconds, cpu_s, None if loss is None else float(loss))

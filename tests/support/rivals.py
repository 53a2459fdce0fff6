"""One training step by pipecompile, by torch.distributed.pipelining, by one plain process, and by
processes that don't wait for each other.

Every process of a gang keeps its rivals between calls, so that a benchmark times steps alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest import mock

import pipecompile
import torch
import torch.distributed as dist
import transformers as hf
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, SplitPoint, pipeline

ROWS, LENGTH, MICROBATCHES, WORDS = 16, 128, 8, 4096
ADAMW = partial(torch.optim.AdamW, lr=3e-4)


@dataclass(frozen=True)
class Size:
    """Of the model.

    Attributes:
        balanced: how many layers the first of two stages gets if it is balanced by hand.
    """

    layers: int
    width: int
    heads: int
    balanced: int

    @property
    def equal(self) -> int:
        return self.layers // 2

    def __str__(self) -> str:
        return f"{self.layers} × {self.width}"


NARROW = Size(8, 256, 8, balanced=5)  # the head costs about 1.3 layers
WIDE = Size(4, 768, 12, balanced=2)  # ... about 0.4


def model(size: Size = NARROW) -> nn.Module:
    """GPT-2-like. Not tied: torch.distributed.pipelining has wrong gradients there."""
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = hf.GPT2Config(
        n_layer=size.layers,
        n_embd=size.width,
        n_head=size.heads,
        n_positions=LENGTH,
        vocab_size=WORDS,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
        tie_word_embeddings=False,
        **rates,
    )
    return hf.GPT2LMHeadModel(config)


def batch(seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    ids = torch.randint(0, WORDS, (ROWS, LENGTH))
    return {"input_ids": ids, "labels": ids}


@cache
def compiled(
    schedule: str,
    size: Size = NARROW,
    precision: str | pipecompile.Precision | None = None,
    virtual: int | None = None,
    backend: str = "eager",
    **options: Any,
) -> Callable[[], Any]:
    pipe = pipecompile.compile(
        model(size),
        2,
        microbatches=MICROBATCHES,
        optimizer=ADAMW,
        schedule=schedule,
        virtual_stages=virtual,
        precision=precision,
        backend=backend,
        **options,
    )
    return lambda: pipe.step(batch())


class Part(nn.Module):
    """What a user of torch.distributed.pipelining writes by hand: some layers of GPT-2.

    Args:
        first, last: with what comes before the layers, and after them.
    """

    def __init__(self, layers: range, first: bool, last: bool, size: Size = NARROW):
        super().__init__()
        whole: Any = model(size)
        self.first, self.last = first, last
        if first:
            self.wte, self.wpe = whole.transformer.wte, whole.transformer.wpe
        self.h = nn.ModuleList(whole.transformer.h[i] for i in layers)
        if last:
            self.ln_f, self.lm_head = whole.transformer.ln_f, whole.lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            x = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.h:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.lm_head(self.ln_f(x)) if self.last else x


def half(stage: int, layers: int, size: Size = NARROW) -> nn.Module:
    """One of two stages, the first with so many layers."""
    mine = range(layers, size.layers) if stage else range(layers)
    return Part(mine, stage == 0, stage == 1, size)


def next_word_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten())


class _Logits(nn.Module):
    """The unmodified model, as the front end of torch.distributed.pipelining takes it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.whole = model(size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.whole(input_ids=ids).logits


def by_hand(layers: int, size: Size = NARROW, inductor: bool = False) -> PipelineStage:
    """Stages rewritten by hand, the first with so many layers; with torch.compile over each."""
    rank = dist.get_rank()
    part: Any = half(rank, layers, size)
    return PipelineStage(torch.compile(part) if inductor else part, rank, 2, torch.device("cpu"))


def by_front_end(size: Size = NARROW) -> Any:
    """Stages that torch.distributed.pipelining cuts out of the model, with as many layers each."""
    ids = batch()["input_ids"].chunk(MICROBATCHES)[0]
    begin = {f"whole.transformer.h.{size.equal}": SplitPoint.BEGINNING}
    cut = pipeline(_Logits(size), mb_args=(ids,), split_spec=begin)
    return cut.build_stage(dist.get_rank(), torch.device("cpu"))


@cache
def pipelining(
    make_stage: Callable[[], Any], autocast: torch.dtype | None = None
) -> Callable[[], Any]:
    """torch.distributed.pipelining; with autocast around the whole schedule, which casts every
    weight once per step."""
    rank = dist.get_rank()
    stage = make_stage()
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=next_word_loss)
    optimizer = ADAMW(stage.submod.parameters())

    def step() -> list[torch.Tensor]:
        whole, losses = batch(), []
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            if rank == 0:
                schedule.step(whole["input_ids"])
            else:
                schedule.step(target=whole["labels"], losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        return losses

    return step


@cache
def plain() -> Callable[[], Any]:
    """One process with one thread; the others wait."""
    if dist.get_rank():
        return lambda: None
    whole = model()
    optimizer = ADAMW(whole.parameters())

    def step() -> None:
        pieces = {k: v.chunk(MICROBATCHES) for k, v in batch().items()}
        for i in range(MICROBATCHES):
            loss = whole(**{k: v[i] for k, v in pieces.items()}).loss
            (loss / MICROBATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@cache
def limit() -> Callable[[], Any]:
    """Every process runs all of the model on its part of the microbatches, waiting for nobody."""
    ranks = dist.get_world_size()
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    with (
        mock.patch.dict(os.environ, alone, clear=True),
        mock.patch.object(dist, "is_initialized", return_value=False),
    ):
        pipe = pipecompile.compile(model(), 1, microbatches=MICROBATCHES // ranks, optimizer=ADAMW)
        piece = {k: v[: ROWS // ranks] for k, v in batch().items()}
        pipe.step(piece)
    return lambda: pipe.step(piece)


FRONT_END = "torch 1F1B, its front end"
TORCH_COMPILE = "the same, torch.compile over both"
LIMIT = "the limit: no pipeline"
BEST = "pipecompile zb_v"
BEST_FUSED = "pipecompile zb_v, inductor"
_measured = partial(compiled, costs="profile")  # whatever tests are set to
RIVALS: dict[str, Callable[[], Callable[[], Any]]] = {
    "pipecompile 1f1b": partial(_measured, "1f1b"),
    "pipecompile zb_h1": partial(_measured, "zb_h1"),
    BEST: partial(_measured, "zb_v", virtual=2),
    BEST_FUSED: partial(_measured, "zb_v", virtual=2, backend="inductor"),
    FRONT_END: partial(pipelining, by_front_end),
    "torch 1F1B, rewritten by hand": partial(pipelining, partial(by_hand, NARROW.equal)),
    "the same, balanced by hand": partial(pipelining, partial(by_hand, NARROW.balanced)),
    TORCH_COMPILE: partial(pipelining, partial(by_hand, NARROW.balanced, inductor=True)),
    "one process, one thread": plain,
    LIMIT: limit,
}
OURS = tuple(name for name in RIVALS if name.startswith("pipecompile"))


def meet() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def step(name: str) -> float:
    return timed(RIVALS[name])


def timed(rival: Callable[[], Callable[[], Any]]) -> float:
    """Seconds of one step, from when all are ready to when all are done."""
    meet()
    run = rival()
    dist.barrier()
    start = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - start


def losses() -> tuple[float, float] | None:
    """The first loss of both pipelines, on the rank that has both: they train the same thing.

    They are made for it: what is timed has trained before.
    """
    mine, theirs = compiled.__wrapped__("1f1b")(), pipelining.__wrapped__(by_front_end)()
    return (float(mine), float(torch.stack(theirs).mean())) if dist.get_rank() == 1 else None

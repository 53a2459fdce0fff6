"""Flattened batches of documents, a model that sees borders, and the plain loop over pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate as added
from typing import Any

import torch
from pipecompile.data import cut_documents
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from support import jobs
from support.weighed import accumulate

WIDTH, WORDS, IGNORED = 8, 16, -100
Batch = dict[str, torch.Tensor]
Count = Callable[[Batch], int]


def flattened(lengths: Sequence[int], seed: int = 0) -> Batch:
    """As transformers' DataCollatorWithFlattening makes it: one row."""
    torch.manual_seed(seed)
    place = torch.cat([torch.arange(n) for n in lengths])[None]
    tokens = torch.randint(WORDS, place.shape)
    labels = torch.where(place == 0, IGNORED, tokens)
    return {"input_ids": tokens, "position_ids": place, "labels": labels}


def bordered(lengths: Sequence[int], seed: int = 0) -> Batch:
    """Without rows: tokens, and the borders of documents."""
    torch.manual_seed(seed)
    tokens = torch.randint(WORDS, (sum(lengths),))
    borders = torch.tensor([0, *added(lengths)])
    return {"input_ids": tokens, "cu_seqlens": borders, "targets": tokens.flip(0)}


class Bordered(nn.Module):
    """Documents attend to themselves alone. Its loss is one of several."""

    def __init__(self, loss: str = "tokens") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss = loss
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.mix = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))

    def forward(
        self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor, targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        place = torch.arange(input_ids.shape[0])
        document = torch.searchsorted(cu_seqlens, place, right=True) - 1
        mask = (document[:, None] == document) & (place[:, None] >= place)
        states = self.embed(input_ids)
        for layer in self.mix:
            query, key, value = layer(states)[None].chunk(3, -1)
            states = states + scaled_dot_product_attention(query, key, value, attn_mask=mask)[0]
        logits = self.head(states)
        each = cross_entropy(logits, targets, reduction="none")
        documents = cu_seqlens.shape[0] - 1
        sums = torch.zeros(documents).index_add(0, document, each)
        made = {"logits": logits, "each": each, "documents": sums}
        return made | {"loss": LOSSES[self.loss](made, targets, cu_seqlens, documents)}


Made = dict[str, torch.Tensor]
LOSSES: dict[str, Callable[[Made, torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "tokens": lambda made, *_: made["each"].mean(),
    "elements": lambda made, *_: made["logits"].square().mean(),
    "divided": lambda made, targets, *_: made["each"].sum() / targets.shape[0],
    "kept": lambda made, targets, *_: cross_entropy(made["logits"], targets),
    "sum": lambda made, *_: made["each"].sum(),
    "documents": lambda made, *_: made["documents"].mean(),
    "by documents": lambda made, targets, borders, count: made["each"].sum() / count,
    "means of documents": lambda made, t, borders, _: (made["documents"] / borders.diff()).mean(),
    "two": lambda made, *_: made["each"].mean() + 0.1 * made["documents"].mean(),
    "shorter": lambda made, *_: made["each"][1:].mean(),
    "by the end": lambda made, targets, borders, _: made["each"].sum() / borders[-1],
    "root": lambda made, *_: made["each"].square().mean().sqrt(),
    "product": lambda made, *_: made["each"].mean() * made["documents"].mean(),
}
"""What they are of: its outputs, targets, borders and the number of documents."""

cut_borders = partial(cut_documents, shifted=())


def kept(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def tokens(batch: Batch) -> int:
    return len(batch["targets"])


def accumulated(
    model: nn.Module,
    batch: Batch,
    dp: int,
    microbatches: int,
    cut: Callable[[Batch, int], list[Any]],
    count: Count,
) -> torch.Tensor:
    """Set ``.grad`` to what a plain loop over the same pieces gives, each weighed by what it
    counts; the loss."""
    shares = [
        [piece for piece in cut(share, microbatches) if piece["input_ids"].numel()]
        for share in cut(batch, dp)
    ]
    loss, grads = accumulate(
        model, shares, microbatches, count, lambda _, piece: model(**piece)["loss"]
    )
    for name, param in model.named_parameters():
        param.grad = grads.get(name)
    return loss


def trained(
    pipe: Any, batches: Sequence[Batch], cut: Callable[[Batch, int], list[Any]]
) -> tuple[list[torch.Tensor], list[Batch], Batch]:
    """Losses, gradients and parameters of some clipped steps, with this process's shares."""
    losses, grads = [], []
    for batch in batches:
        losses.append(pipe.forward_backward(cut(batch, pipe.data_shards)[pipe.data_shard]))
        grads.append({n: p.grad.clone() for n, p in pipe.named_parameters()})
        pipe.clip_grad_norm_(0.1)
        pipe.optimizer.step()
        pipe.zero_grad()
    return losses, grads, pipe.state_dict()


def trained_plainly(
    model: nn.Module, batches: Sequence[Batch], *how: Any
) -> tuple[list[torch.Tensor], list[Batch], Batch]:
    """The oracle for `trained`; arguments as of `accumulated`."""
    optimizer, losses, grads = jobs.OPTIMIZERS["adamw"](model.parameters()), [], []
    for batch in batches:
        losses.append(accumulated(model, batch, *how))
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return losses, grads, dict(model.state_dict())

"""The same training on one device, in plain PyTorch, beside what a pipeline has computed."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pipecompile
import torch
import torch.distributed as dist
from torch import nn

Batch = Mapping[str, torch.Tensor]
Values = Mapping[Any, torch.Tensor]


def kept_labels(batch: Batch) -> int:
    """What the mean of a cross entropy is over: rows of a classifier, or tokens that count."""
    return int((batch["labels"] != -100).sum())


def compare(
    pipe: pipecompile.Pipeline,
    model: nn.Module,
    batches: Iterable[Batch],
    losses: Sequence[torch.Tensor],
    *,
    count: Callable[[Batch], int] = kept_labels,
    **training: Any,
) -> None:
    """Train the plain model on one device and print whether it comes to the same.

    Every rank calls it; rank 0 trains and prints.

    Args:
        model: as it was compiled.
        batches: what each step was given on this process, in their order.
        losses: what each step returned; of a run that was resumed, each of the last ones.
        count: what the loss of a part of a batch is the mean over.
        training: options that ``compile`` was given: ``optimizer``, ``microbatches``, and others.
    """
    shares = _of_all_replicas(pipe, list(batches))
    trained = pipe.state_dict()
    if not pipe.is_main:
        return
    plain = copy.deepcopy(model)
    expected = train_plain(plain, shares, count=count, **training)
    expected = expected[-len(losses) :]
    print(f"{'':24}first loss   last loss")
    name = f"{pipe.plan.n_stages} stages, {pipe.plan.dp} replicas"
    for what, found in ((name, losses), ("one device", expected)):
        print(f"{what:24}{found[0]:10.6f}  {found[-1]:10.6f}")
    state = plain.state_dict()
    mine = dict(enumerate(loss.cpu() for loss in losses)), dict(enumerate(expected))
    _say("losses", *mine)
    _say("parameters", trained, {name: state[name] for name in trained})


def _say(what: str, found: Values, expected: Values) -> None:
    """How many are equal to the last bit, and how far the others are apart."""
    equal = [torch.equal(found[key], expected[key]) for key in expected]
    line = f"{what} equal: {sum(equal)} of {len(equal)}"
    if not all(equal):
        apart = max(float((found[key] - expected[key]).abs().max()) for key in expected)
        line += f", at most {apart:.1e} apart"
    print(line)


def train_plain(
    model: nn.Module,
    steps: Sequence[Sequence[Batch]],
    *,
    optimizer: Callable[..., torch.optim.Optimizer],
    microbatches: int,
    count: Callable[[Batch], int] = kept_labels,
    lr_scheduler: Callable[..., Any] | None = None,
    max_grad_norm: float | None = None,
    precision: str | None = None,
    dp: int = 1,
    before: Callable[[int], None] = lambda step: None,
) -> list[torch.Tensor]:
    """Train a model as a loop over microbatches does; the loss of each step.

    Args:
        steps: the shares of the replicas, per step.
        before: is called with the number of the step that follows.
        precision: None or "bf16".
    """
    model.train()
    made = optimizer(model.parameters())
    scheduler = lr_scheduler(made) if lr_scheduler else None
    losses = []
    for step, shares in enumerate(steps):
        before(step)
        pieces = [[p for p in cut(share, microbatches) if _rows(p)] for share in shares]
        total = sum(count(piece) for replica in pieces for piece in replica)
        weights = [[count(piece) / total for piece in replica] for replica in pieces]
        losses.append(_backward(model, pieces, weights, precision))
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        made.step()
        if scheduler is not None:
            scheduler.step()
        made.zero_grad()
    return losses


def _backward(
    model: nn.Module,
    pieces: Sequence[Sequence[Batch]],
    weights: Sequence[Sequence[float]],
    precision: str | None,
) -> torch.Tensor:
    """Leaves in ``.grad`` the mean over replicas of what each adds up; returns the loss of all."""
    mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    totals: dict[nn.Parameter, list[torch.Tensor]] = {}
    losses = []
    for replica, shares in zip(pieces, weights, strict=True):
        for piece, share in zip(replica, shares, strict=True):
            with mixed:
                loss = model(**piece)["loss"]
            (loss * (share * len(pieces))).backward()
            losses.append(loss.detach())
        for param in model.parameters():
            if param.grad is not None:
                totals.setdefault(param, []).append(param.grad)
                param.grad = None
    for param, grads in totals.items():
        param.grad = sum(grads[1:], grads[0]) / len(pieces)
    flat = [share for shares in weights for share in shares]
    if all(share == 1 / len(flat) for share in flat):
        return torch.stack(losses).view(len(pieces), -1).mean(1).mean()
    terms = (share * loss.double() for share, loss in zip(flat, losses, strict=True))
    return sum(terms, torch.zeros((), dtype=torch.float64)).float()


def _of_all_replicas(pipe: pipecompile.Pipeline, batches: Sequence[Batch]) -> list[list[Batch]]:
    """The shares of the replicas, per step."""
    if pipe.data_shards == pipe.plan.dp == 1:
        return [[batch] for batch in batches]
    if pipe.data_shards == 1:  # one process plays all replicas
        return [cut(batch, pipe.plan.dp) for batch in batches]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (pipe.data_shard, None if None in batches else batches))
    by_shard = {shard: found for shard, found in everyone if found is not None}
    return [list(step) for step in zip(*(by_shard[i] for i in sorted(by_shard)), strict=True)]


def cut(batch: Batch, parts: int) -> list[Batch]:
    """By rows, into parts that differ by at most one; the larger come first."""
    pieces = {name: value.tensor_split(parts) for name, value in batch.items()}
    return [{name: piece[i] for name, piece in pieces.items()} for i in range(parts)]


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))

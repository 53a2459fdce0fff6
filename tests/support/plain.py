"""The oracle: gradient accumulation in one plain process, as a textbook writes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass
class Trained:
    """What a run left behind, per step where it is a list."""

    losses: list[torch.Tensor]
    grads: list[dict[str, torch.Tensor]]
    norms: list[torch.Tensor]
    params: dict[str, torch.Tensor]


def cut(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    pieces = {key: value.chunk(parts) for key, value in batch.items()}
    return [{key: piece[i] for key, piece in pieces.items()} for i in range(parts)]


def autocast(dtype: torch.dtype | None, device: str = "cpu") -> Any:
    """torch's own mixed precision; nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)


def accumulate(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    dp: int,
    microbatches: int,
    dtype: torch.dtype | None = None,
    scale: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss,
) -> torch.Tensor:
    """Set ``.grad`` to the mean over replicas of what each accumulates; returns the mean loss.

    Args:
        dtype: computed under autocast to it.
        scale: the loss before it is differentiated.
    """
    per_replica, losses = [], []
    for shard in cut(batch, dp):
        model.zero_grad()
        found = []
        for piece in cut(shard, microbatches):
            with autocast(dtype, next(model.parameters()).device.type):
                loss = model(**piece).loss
            scale(loss / microbatches).backward()
            found.append(loss.detach())
        losses.append(torch.stack(found).mean())
        per_replica.append({n: p.grad for n, p in model.named_parameters()})
        for param in model.parameters():
            param.grad = None
    for name, param in model.named_parameters():
        grads = [replica[name] for replica in per_replica if replica[name] is not None]
        if grads:
            total = grads[0]
            for grad in grads[1:]:
                total = total + grad
            param.grad = total / dp
    return torch.stack(losses).mean()


def train(
    model: nn.Module,
    batches: list[dict[str, torch.Tensor]],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    dp: int = 1,
    microbatches: int = 1,
    max_norm: float = 0.1,
    dtype: torch.dtype | None = None,
    init_scale: float = 2.0**16,
    interval: int = 2000,
    clip: Callable[[Any, float], torch.Tensor] = nn.utils.clip_grad_norm_,
) -> Trained:
    """Several steps with clipping active; under autocast to ``dtype``, with a `GradScaler` for
    fp16. A step that the scaler skips has no gradients, norm 0."""
    made = optimizer(model.parameters())
    fp16 = dtype is torch.float16
    kind = next(model.parameters()).device.type
    scaler = torch.amp.GradScaler(kind, init_scale, growth_interval=interval, enabled=fp16)
    run = Trained([], [], [], {})
    for batch in batches:
        run.losses.append(accumulate(model, batch, dp, microbatches, dtype, scaler.scale))
        scaler.unscale_(made)
        if any(not p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
            run.grads.append({})
            run.norms.append(torch.zeros(()))
        else:
            named = model.named_parameters()
            run.grads.append({n: p.grad.clone() for n, p in named if p.grad is not None})
            run.norms.append(clip(list(model.parameters()), max_norm))
        scaler.step(made)
        scaler.update()
    run.params = {name: value.clone() for name, value in model.state_dict().items()}
    return run


def train_pipeline(
    pipe: Any, batches: list[dict[str, torch.Tensor]], max_norm: float = 0.1
) -> Trained:
    """The same loop over a compiled pipeline; each process sees the gradients it holds."""
    run = Trained([], [], [], {})
    for batch in batches:
        share = cut(batch, pipe.data_shards)[pipe.data_shard]
        run.losses.append(pipe.forward_backward(share).clone())
        end_step(pipe, run, max_norm)
    run.params = pipe.state_dict()
    return run


def end_step(pipe: Any, run: Trained, max_norm: float) -> None:
    """Clip, step and clear the gradients of a pipeline, and note them and their norm."""
    named = pipe.named_parameters()
    run.grads.append({n: p.grad.clone() for n, p in named if p.grad is not None})
    run.norms.append(pipe.clip_grad_norm_(max_norm))
    pipe.optimizer.step()
    pipe.zero_grad()


def assert_equal(found: Trained, expected: Trained, whole: bool = True) -> None:
    """Losses, gradients, norms and parameters, bit for bit.

    Args:
        whole: whether ``found`` has every gradient, and not only one process's.
    """
    for step, (a, b) in enumerate(zip(found.losses, expected.losses, strict=True)):
        assert torch.equal(a, b), f"loss of step {step}: {a} is not {b}"
    for step, (mine, theirs) in enumerate(zip(found.grads, expected.grads, strict=True)):
        if whole:
            assert set(mine) == set(theirs)
        wrong = [n for n in mine if n not in theirs or not torch.equal(mine[n], theirs[n])]
        assert not wrong, f"gradients of step {step} differ: {wrong}"
    for a, b in zip(found.norms, expected.norms, strict=True):
        assert torch.equal(a, b)
    assert list(found.params) == list(expected.params)
    wrong = [n for n in found.params if not torch.equal(found.params[n], expected.params[n])]
    assert not wrong, f"parameters differ: {wrong}"


def equal(a: Any, b: Any) -> bool:
    """Values of dicts and lists, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)

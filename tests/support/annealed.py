"""Models whose batches have plain numbers, which change from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pipecompile
import torch
from torch import nn

from . import jobs, plain

WIDTH, WORDS, ROWS, LENGTH = 8, 16, 4, 6
ANNEALED = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55]
Batch = dict[str, Any]
Way = Callable[[torch.Tensor, Any], torch.Tensor]


def mixed(x: torch.Tensor, beta: Any) -> torch.Tensor:
    return x.tanh() * (1 - beta) + x * beta / 2


class Model(nn.Module):
    """Does something with a number in each of its layers."""

    traced_once = True

    def __init__(self, way: Way = mixed) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, beta: Any = 0.5) -> torch.Tensor:
        states = self.embed(x)
        for layer in self.layers:
            states = self.way(layer(states), beta)
        logits: torch.Tensor = self.head(states)
        return logits


def penalised(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Two means of no dimension, of which one is weighed by a number."""
    entropy = nn.functional.cross_entropy(logits.flatten(0, 1), batch["y"].flatten())
    weight = batch["weights"]["penalty"]
    total: torch.Tensor = entropy + weight * logits.square().mean() - weight**2 * 0.1
    return total


penalised.traced_once = True  # type: ignore[attr-defined]


def batches(betas: list[float], ignored: bool = False) -> list[Batch]:
    """With numbers that change, in two places."""
    found = []
    for i, beta in enumerate(betas):
        torch.manual_seed(i)
        x = torch.randint(WORDS, (ROWS, LENGTH))
        y = x.clone()
        if ignored:
            y[0, i % LENGTH :] = -100
        found.append({"x": x, "y": y, "beta": beta, "weights": {"penalty": 1 / (i + 1)}})
    return found


def piped(model: nn.Module, n_stages: int = 1, **options: Any) -> Any:
    options = {"loss_fn": penalised, "max_grad_norm": 0.1} | options
    return pipecompile.compile(
        model, n_stages, optimizer=jobs.OPTIMIZERS["adamw"], seed=0, **options
    )


def trained(pipe: Any, given: list[Batch]) -> plain.Trained:
    run = plain.Trained([], [], [], {})
    for batch in given:
        run.losses.append(pipe.forward_backward(batch).clone())
        run.grads.append({n: p.grad.clone() for n, p in pipe.named_parameters()})
        run.norms.append(pipe.clip_grad_norm_(0.1))
        pipe.optimizer.step()
        pipe.zero_grad()
    run.params = pipe.state_dict()
    return run


def plainly(
    model: nn.Module,
    given: list[Batch],
    pieces: int = 1,
    dp: int = 1,
    dtype: torch.dtype | None = None,
) -> plain.Trained:
    """The same in a loop over so many pieces of each of so many replicas."""
    run = plain.Trained([], [], [], {})
    optimizer = jobs.OPTIMIZERS["adamw"](model.parameters())
    for batch in given:
        losses, grads = [], []
        for x, y in zip(batch["x"].chunk(dp), batch["y"].chunk(dp), strict=True):
            found = []
            for mine in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                with plain.autocast(dtype):
                    loss = penalised(model(mine[0], batch["beta"]), batch | {"y": mine[1]})
                (loss / pieces).backward()
                found.append(loss.detach())
            losses.append(torch.stack(found).mean())
            grads.append([param.grad for param in model.parameters()])
            optimizer.zero_grad()
        for param, *each in zip(model.parameters(), *grads, strict=True):
            param.grad = sum(each[1:], each[0]) / dp
        run.losses.append(torch.stack(losses).mean())
        run.grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        run.norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()
        optimizer.zero_grad()
    run.params = {name: value.clone() for name, value in model.state_dict().items()}
    return run

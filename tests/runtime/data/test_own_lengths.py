"""Replicas that pad to the longest row of their own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.errors import RankMismatchError
from support import jobs, plain
from support.gang import Gang
from support.matrix import quickly
from support.weighed import IGNORED
from torch import nn

WIDTH, WORDS = 8, 16
Batch = dict[str, torch.Tensor]
STEPS = (((4, 9), (2, 6)), ((4, 9), (0, 3)), ((3, 5), (4, 12)), ((2, 7), (2, 7)))
"""Of each step and replica, rows and length."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Output:
        states = self.embed(input_ids)
        for layer in self.layers:
            states = states + layer(states.cumsum(1)).tanh()
        logits = self.head(states)[:, :-1].flatten(0, 1)
        return Output(nn.functional.cross_entropy(logits, labels[:, 1:].flatten()))


@dataclass
class Output:
    loss: torch.Tensor


def share(rows: int, length: int) -> Batch:
    torch.manual_seed(100 * rows + length)
    tokens = torch.randint(WORDS, (rows, length))
    kept = torch.arange(length) < torch.arange(2, rows + 2)[:, None] * length // (rows + 1)
    return {"input_ids": tokens, "labels": torch.where(kept, tokens, IGNORED)}


def piped(n_stages: int, dp: int, **options: Any) -> Any:
    optimizer = jobs.OPTIMIZERS["adamw"]
    return pipecompile.compile(Model(), n_stages, dp, optimizer=optimizer, **options)


def trained(steps: int) -> Any:
    """With batches of this process's replica."""
    pipe = piped(1, 2, microbatches=2, max_grad_norm=0.5)
    mine = [share(*step[int(os.environ["RANK"])]) for step in STEPS[:steps]]
    losses = [pipe.step(batch) for batch in mine]
    return losses, pipe.evaluate(mine[0]), pipe.evaluate(iter(mine)), pipe.state_dict()


def kept(batches: list[Batch]) -> int:
    return sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)


def plainly(steps: int) -> Any:
    """Each replica adds up its microbatches, weighed by the labels that all of them keep."""
    model = Model()
    optimizer = jobs.OPTIMIZERS["adamw"](model.parameters())
    losses = []
    for step in STEPS[:steps]:
        shares = [share(*sizes) for sizes in step]
        total, sums = torch.zeros((), dtype=torch.float64), []
        for batch in shares:
            rows = len(batch["labels"])
            for piece in plain.cut(batch, 2) if rows else []:
                loss = model(**piece).loss
                (loss * (2 * kept([piece]) / kept(shares))).backward()
                total += loss.detach().double() * (kept([piece]) / kept(shares))
            sums.append([param.grad for param in model.parameters()])
            model.zero_grad()
        for param, *grads in zip(model.parameters(), *sums, strict=True):
            found = [torch.zeros_like(param) if each is None else each for each in grads]
            param.grad = (found[0] + found[1]) / 2
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.float())
    return losses, model


def mean(model: Any, batches: list[Batch]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found = [model(**each).loss.double() * kept([each]) for each in batches if kept([each])]
    return (torch.stack(found).sum() / kept(batches)).float()


@pytest.mark.slow
@pytest.mark.parametrize("steps", quickly([2], [2, 4]))
def test_replicas_have_lengths_of_their_own(gang: Callable[[int], Gang], steps: int) -> None:
    """And numbers of rows; one has none in a step."""
    losses, model = plainly(steps)
    shares = [[share(*sizes) for sizes in step] for step in STEPS[:steps]]
    for found, first, whole, state in gang(2).run(trained, steps):
        for one, other in zip(found, losses, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(first, mean(model, shares[0]), rtol=1e-6, atol=0)
        flat = [each for step in shares for each in step]
        torch.testing.assert_close(whole, mean(model, flat), rtol=1e-6, atol=0)


def told_of_padding(loss: str) -> list[str]:
    """What is said when replicas pad to lengths of their own, and nothing where they do not."""
    losses = {
        "elements": lambda out, batch: out.square().mean(),
        "kept": lambda out, batch: nn.functional.cross_entropy(
            out.flatten(0, 1), batch["labels"].flatten()
        ),
    }
    torch.manual_seed(0)
    pipe = pipecompile.compile(
        nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)),
        1,
        2,
        microbatches=1,
        loss_fn=lambda out, batch: losses[loss](out, batch),
        optimizer=jobs.SGD,
    )
    rank = int(os.environ["RANK"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length in (6, 6 + rank):
            said = len(caught)
            ids = torch.arange(2 * length).view(2, length) % WORDS
            pipe.step({"input": ids} if loss == "elements" else {"input": ids, "labels": ids})
    assert not any("lengths of their own" in str(each.message) for each in caught[:said])
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(("loss", "times"), [("elements", 1), ("kept", 0)])
def test_padding_that_a_loss_may_count_is_said(
    gang: Callable[[int], Gang], loss: str, times: int
) -> None:
    for said in gang(2).run(told_of_padding, loss):
        assert sum("lengths of their own" in text for text in said) == times


def unlike_stages() -> str:
    pipe = piped(2, 1, microbatches=1)
    pipe.step(share(2, 6))
    with pytest.raises(RankMismatchError) as raised:
        pipe.step(share(2, 6 + int(os.environ["RANK"])))
    pipe.step(share(2, 6))
    return str(raised.value)


def test_stages_of_a_replica_have_one_length(gang: Callable[[int], Gang]) -> None:
    for text in gang(2).run(unlike_stages):
        assert "rank 0 was called with (train input_ids: int64[1, 6]" in text
        assert "rank 1 with (train input_ids: int64[1, 7]" in text

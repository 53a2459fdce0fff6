"""Processes whose stages read nothing of the batch, and are given none."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.errors import BatchError, PipecompileError
from support import jobs, plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn

STAGES, WIDTH, WORDS = 3, 8, 16


class Model(nn.Module):
    """Of which the first layer reads tokens, and the last one labels."""

    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.embed(input_ids)
        for layer in self.layers:
            states = states + layer(states).tanh()
        logits = self.head(states)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def batch(length: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(length)
    tokens = torch.randint(WORDS, (4, length))
    return {"input_ids": tokens, "labels": tokens}


def piped(**options: Any) -> Any:
    optimizer = jobs.OPTIMIZERS["adamw"]
    return pipecompile.compile(Model(), STAGES, microbatches=2, optimizer=optimizer, **options)


def used(gives: Callable[[pipecompile.Pipeline, Any], Any], other: int) -> list[Any]:
    """What is returned for batches of two lengths, one of which may not have been met before."""
    pipe = piped(example_batch=batch(8))

    def given(*lengths: int) -> list[Any]:
        return [gives(pipe, batch(length)) for length in lengths]

    losses = [pipe.step(each) for each in given(8, other, 8)]
    whole = given(8, other)
    losses += [pipe.evaluate(iter(() if None in whole else whole)), pipe.evaluate(*given(other))]
    output = pipe.forward(*given(8))
    return [torch.stack(losses), None if output is None else output["logits"], pipe.state_dict()]


def without_data(other: int) -> tuple[bool, list[Any]]:
    pipe = piped()
    assert pipe.needs_data
    pipe.compile_for(batch(8))
    return pipe.needs_data, used(lambda pipe, each: each if pipe.needs_data else None, other)


@pytest.mark.slow
@pytest.mark.parametrize("other", quickly([8], [8, 5]))
def test_stages_in_the_middle_need_none(gang: Callable[[int], Gang], other: int) -> None:
    losses, _, state = used(lambda _, each: each, other)
    found = gang(STAGES).run(without_data, other)
    assert [needs for needs, _ in found] == [True, False, True]
    for _, (mine, _, kept) in found:
        assert torch.equal(mine, losses)
        assert plain.equal(kept, state)


def lacking(missing: int) -> str:
    pipe = piped(example_batch=batch(8))
    try:
        pipe.step(None if int(os.environ["RANK"]) == missing else batch(8))
    except PipecompileError as error:
        text = f"{type(error).__name__}: {error}"
    pipe.step(batch(8))
    return text


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "BatchError: rank 0 was given no batch, and it has the first stage"),
        (2, "BatchError: rank 2 was given no batch, and its stages read of it"),
    ],
)
def test_who_needs_it_is_told_on_all_ranks(
    gang: Callable[[int], Gang], rank: int, message: str
) -> None:
    for text in gang(STAGES).run(lacking, rank):
        assert text.startswith(message)


def test_one_process_needs_it() -> None:
    pipe = piped()
    assert pipe.needs_data
    with pytest.raises(BatchError, match="the batch is None: give one"):
        pipe.step(None)

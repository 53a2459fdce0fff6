"""Ranks of a Trainer that meet for different things are named, as those of a pipeline are."""

from __future__ import annotations

from collections.abc import Callable

import pipecompile
import pytest
import torch
import torch.distributed as dist
from pipecompile.compiler.ir.errors import RankMismatchError
from pipecompile.runtime.integrations.meeting import Meeting
from support import jobs
from support.gang import Gang
from torch import nn


def meeting() -> Meeting:
    found, layers = Meeting(), [nn.Linear(4, 4) for _ in range(2)]
    found.pipe = pipecompile.compile(
        nn.Sequential(*layers), 2, optimizer=jobs.SGD, loss_fn=lambda out, _: out.mean()
    )
    return found


def met() -> tuple[list[int], torch.Tensor, str]:
    here, rank = meeting(), dist.get_rank()
    told = here.gather(rank, "the items of a step")
    torch.manual_seed(rank)
    here.draw_alike()
    drawn = torch.rand(3)
    with pytest.raises(RankMismatchError) as raised:
        here.gather(None, "a checkpoint" if rank else "an evaluation")
    return told, drawn, str(raised.value)


def test_ranks_are_told_and_named(gang: Callable[[int], Gang]) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    for told, drawn, message in gang(2).run(met):
        assert told == [0, 1]
        assert torch.equal(drawn, expected)
        assert "rank 0 is in an evaluation (call 3) and rank 1 in a checkpoint (call 3)" in message


def test_one_process_meets_itself() -> None:
    assert meeting().gather(5, "a step") == [5]
    assert Meeting().gather(5, "a step") == [5]

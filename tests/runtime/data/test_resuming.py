"""Loaders of one's own, resumed in the middle of a pass: exactly the next batch, and the rest."""

from __future__ import annotations

import copy
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.data import Resumable
from pipecompile.errors import OptionError, StateError
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
)

ROWS = [{"input_ids": t, "labels": t} for t in models.batches("gpt2", 22, 1)[0]["input_ids"]]


class Noisy(Dataset[Any]):
    """Items that draw, and count how often they are read."""

    def __init__(self, drawn: bool = True):
        self.reads, self._drawn = 0, drawn

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return torch.tensor([index, torch.rand(()) if self._drawn else 0.0])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from (torch.tensor([i, torch.rand(())]) for i in range(22))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


LOADERS: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(Noisy(), 4),
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True, drop_last=True),
    "its generator": lambda: DataLoader(Noisy(), 4, shuffle=True, generator=generator()),
    "a sampler's": lambda: DataLoader(
        Noisy(), 4, sampler=RandomSampler(Noisy(), generator=generator())
    ),
    "again and again": lambda: DataLoader(
        Noisy(), 4, sampler=RandomSampler(Noisy(), replacement=True, num_samples=70)
    ),
    "distributed": lambda: DataLoader(Noisy(), 4, sampler=DistributedSampler(Noisy(), 2, 1)),
    "one by one": lambda: DataLoader(Noisy(), None, shuffle=True),
    "streamed": lambda: DataLoader(Stream(), 4),
    "workers": lambda: DataLoader(Noisy(drawn=False), 4, shuffle=True, num_workers=2),
    "a list": lambda: [torch.rand(2) for _ in range(5)],
}


def given(rows: Any, passes: int) -> list[torch.Tensor]:
    return [batch.clone() for _ in range(rows.epoch, passes) for batch in rows]


@pytest.mark.parametrize("kind", quickly([k for k in LOADERS if k != "workers"], LOADERS))
@pytest.mark.parametrize("after", [1, 3])
def test_what_follows_is_what_would_have_followed(kind: str, after: int) -> None:
    torch.manual_seed(5)
    rows = Resumable(LOADERS[kind]())
    uninterrupted: list[torch.Tensor] = []
    saved: Any = None
    for _ in range(3):
        for batch in rows:
            uninterrupted.append(batch.clone())
            if rows.epoch == 1 and rows.batch == after:
                saved = copy.deepcopy(rows.state_dict()), torch.get_rng_state(), len(uninterrupted)
    state, random, count = saved
    torch.manual_seed(5)
    other = Resumable(LOADERS[kind]())
    torch.manual_seed(99)
    other.load_state_dict(state)
    torch.set_rng_state(random)
    assert (other.epoch, other.batch) == (1, after)
    rest = given(other, 3)
    assert plain.equal(rest, uninterrupted[count:])


def test_a_pass_is_that_of_the_loader_itself() -> None:
    torch.manual_seed(1)
    plainly = [batch for _ in range(2) for batch in LOADERS["shuffled"]()]
    torch.manual_seed(1)
    assert plain.equal(given(Resumable(LOADERS["shuffled"]()), 2), plainly)


def test_batches_before_are_not_loaded() -> None:
    rows = Resumable(LOADERS["shuffled"]())
    next(iter(rows))
    state = rows.state_dict()
    data = Noisy()
    other = Resumable(DataLoader(data, 4, shuffle=True, drop_last=True))
    other.load_state_dict(state)
    assert len(list(other)) == 4
    assert data.reads == 16
    assert (other.epoch, other.batch, len(other)) == (1, 0, 5)


def test_a_pass_that_is_left_is_over() -> None:
    rows = Resumable(DataLoader(list(range(6)), 2))
    assert [int(b[0]) for b in itertools.islice(rows, 2)] == [0, 2]
    assert [int(b[0]) for b in rows] == [0, 2, 4]
    assert rows.epoch == 2


def test_epochs_are_told() -> None:
    told: list[int] = []

    class Told(DistributedSampler[Any]):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)
            super().set_epoch(epoch)

    rows = Resumable(DataLoader(Noisy(), 4, sampler=Told(Noisy(), 2, 0)))
    list(rows), list(rows)
    rows.load_state_dict({"epoch": 7, "batch": 0, "start": [], "now": []})
    list(rows)
    assert told == [0, 1, 7]


def test_what_is_no_loader_or_no_position() -> None:
    with pytest.raises(OptionError, match="knows its position itself"):
        Resumable(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="more than once"):
        Resumable(iter([1]))
    rows = Resumable(LOADERS["its generator"]())
    state = rows.state_dict()
    for wrong in ({}, {**state, "epoch": -1}, {**state, "batch": "2"}, None):
        with pytest.raises(StateError, match="has epoch and batch"):
            rows.load_state_dict(wrong)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="generators of its own"):
        Resumable(LOADERS["shuffled"]()).load_state_dict(state)


def training(dp: int, folder: Path, at: int | None, whole: bool = False) -> Any:
    """Two passes, with SIGTERM to rank 0 before step ``at``; goes on from a checkpoint."""
    torch.manual_seed(11)
    pipe = jobs.pipeline("gpt2", 2 // dp, dp, 2, lr_scheduler=scheduler)
    shards, shard = pipe.data_shards, pipe.data_shard
    sampler: Any = DistributedSampler(ROWS, shards, shard, seed=4, drop_last=True)
    rows = Resumable(
        DataLoader(ROWS, 4 // shards, sampler=None if whole else sampler, shuffle=whole)
    )
    pipe.compile_for(next(iter(DataLoader(ROWS, 4 // shards))))
    stop = pipecompile.Preemption()
    losses, steps = [], 0
    if (folder / "latest").exists():
        steps = pipe.load(folder, data=rows)
    try:
        for _ in range(rows.epoch, 2):
            for batch in rows:
                if steps == at and pipe.is_main:
                    os.kill(os.getpid(), signal.SIGTERM)
                losses.append(pipe.step(batch))
                steps += 1
                if stop.requested:
                    pipe.save(folder, data=rows)
                    return losses, None
    finally:
        stop.close()
    return losses, pipe.state_dict()


def scheduler(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


@pytest.mark.parametrize(("dp", "at"), quickly([(2, 3)], [(2, 3), (2, 8), (1, 3)]))
def test_a_run_that_was_stopped_goes_on_with_the_next_batch(
    gang: Callable[[int], Gang], tmp_path: Path, dp: int, at: int
) -> None:
    expected = gang(2).run(training, dp, tmp_path / "never", None)
    first = gang(2).run(training, dp, tmp_path / "run", at)
    second = gang(2).run(training, dp, tmp_path / "run", None)
    for rank in range(2):
        assert len(first[rank][0]) == at + 1
        assert plain.equal(first[rank][0] + second[rank][0], expected[rank][0])
        assert plain.equal(second[rank][1], expected[rank][1])


def test_in_one_process_with_a_shuffled_loader(tmp_path: Path) -> None:
    expected = training(1, tmp_path / "never", None, whole=True)
    first = training(1, tmp_path / "run", 3, whole=True)
    second = training(1, tmp_path / "run", None, whole=True)
    assert plain.equal(first[0] + second[0], expected[0])
    assert plain.equal(second[1], expected[1])

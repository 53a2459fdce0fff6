"""Whole data sets: the loss of all their batches, and the loader that a pipeline makes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.errors import BatchError, OptionError
from pipecompile.runtime.data.dataset_loader import DataSetLoader, DataSetLoaders
from support.gang import Gang
from support.matrix import quickly
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

WORDS, WIDTH, LENGTH, ROWS = 11, 8, 6, 13
IGNORED = -100
ADAMW = partial(torch.optim.AdamW, lr=1e-2)
Row = dict[str, torch.Tensor]


def rows(count: int = ROWS) -> list[Row]:
    """Whose labels are kept in very different numbers, in some not at all."""
    torch.manual_seed(3)
    found = []
    for i in range(count):
        tokens = torch.randint(WORDS, (LENGTH,))
        kept = torch.arange(LENGTH) < (5 * i) % (LENGTH + 1)
        found.append({"x": tokens, "y": torch.where(kept, tokens, IGNORED)})
    return found


class Model(nn.Module):
    """A causal model with a loss of one kind."""

    traced_once = True

    def __init__(self, kind: str = "kept") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed = kind, nn.Embedding(WORDS, WIDTH)
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        states = self.inner(self.embed(x)).tanh()
        logits, labels = self.head(states).flatten(0, 1), y.flatten()
        if self.kind == "rows":
            return logits.square().mean()
        if self.kind == "sum":
            return cross_entropy(logits, labels, reduction="sum")
        loss = cross_entropy(logits, labels)
        if self.kind == "kept":
            return loss
        if self.kind == "two":
            return loss + 0.5 * logits.square().mean()
        return loss + 0.5 * self.embed.weight.square().sum() + states.square().mean()


def collated(found: list[Row]) -> Row:
    return {key: torch.stack([row[key] for row in found]) for key in ("x", "y")}


def whole(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        loss: torch.Tensor = model.eval()(**collated(rows()))
        return loss


def piped(kind: str = "kept", **options: Any) -> pipecompile.Pipeline:
    options = {"n_stages": 2, "microbatches": 2, "optimizer": ADAMW} | options
    return pipecompile.compile(Model(kind), **options)


@pytest.mark.parametrize("kind", quickly(["kept", "two"], ["rows", "kept", "sum", "two", "beside"]))
@pytest.mark.parametrize("microbatches", quickly([2], [1, 2]))
def test_the_loss_of_a_data_set_is_that_of_one_batch(kind: str, microbatches: int) -> None:
    """Whatever the batches keep; the last one of them has one row."""
    loader = DataLoader(rows(), 4, collate_fn=collated)  # type: ignore[arg-type]
    found = piped(kind, microbatches=microbatches).evaluate(loader, progress=False)
    torch.testing.assert_close(found, whole(Model(kind)), rtol=1e-6, atol=0)


def test_own_losses_and_weights() -> None:
    pipe = piped(loss_weight=lambda batch: (batch["y"] != IGNORED).sum())
    batches = [collated(rows()[i : i + 4]) for i in range(0, ROWS, 4)]
    found = pipe.evaluate(iter(batches))
    torch.testing.assert_close(found, whole(Model()), rtol=1e-6, atol=0)


class Divided(Model):
    """By a number in the batch, which is that of the batch."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, y: torch.Tensor, num_items_in_batch: torch.Tensor
    ) -> torch.Tensor:
        logits = self.head(self.inner(self.embed(x)).tanh()).flatten(0, 1)
        return cross_entropy(logits, y.flatten(), reduction="sum") / num_items_in_batch


def test_sums_divided_by_a_number_of_each_batch() -> None:
    batches = [collated(rows()[i : i + 5]) for i in range(0, ROWS, 5)]
    for batch in batches:
        batch["num_items_in_batch"] = (batch["y"] != IGNORED).sum()
    pipe = pipecompile.compile(Divided(), 2, microbatches=2, optimizer=ADAMW)
    model = Divided()
    count = sum(int(batch["num_items_in_batch"]) for batch in batches)
    expected = model(**collated(rows()), num_items_in_batch=torch.tensor(count)).detach()
    torch.testing.assert_close(pipe.evaluate(iter(batches)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "the loader has no batch"),
        (
            [collated([row | {"y": torch.full((LENGTH,), IGNORED)}]) for row in rows(2)],
            "counts",
        ),
    ],
)
def test_data_sets_without_a_loss(batches: list[Row], message: str) -> None:
    with pytest.raises(BatchError, match=message):
        piped(microbatches=1).evaluate(iter(batches))


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    batches = [collated(rows()[:2])] * 3
    loader = DataLoader(batches, None)  # type: ignore[arg-type]
    pipe = piped()
    pipe.evaluate(loader)
    assert not any(capsys.readouterr())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")
        pipe.evaluate(loader, progress=True)
    out, err = capsys.readouterr()
    assert not out
    assert "evaluating" in err


def apart(count: int) -> Any:
    """In a process whose loader has fewer batches than the other's."""
    rank = int(os.environ["RANK"])
    mine = rows()[:9] if rank == 0 else rows()[9:]
    pipe = piped(n_stages=1, dp=2, microbatches=1)
    batches = [collated(mine[i : i + count]) for i in range(0, len(mine), count)]
    return pipe.evaluate(iter(batches))


def test_processes_whose_loaders_end_at_different_batches(gang: Callable[[int], Gang]) -> None:
    for found in gang(2).run(apart, 2):
        torch.testing.assert_close(found, whole(Model()), rtol=1e-6, atol=0)


# -- the loader ----------------------------------------------------------------------------------


class Numbers:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([i, 10 * i])


def bound(count: int, size: int, shards: int, shard: int, seed: int, **options: Any) -> Any:
    loader = DataSetLoader(Numbers(count), size, **options)
    loader.bind(shards, shard, seed, None, False)
    return loader


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_shares_make_up_the_batches(
    count: int, size: int, shards: int, shuffle: bool, drop_last: bool, whole_batches: bool
) -> None:
    """In rank order, as one process has them; every row once in a pass, in another order then."""
    options: dict[str, Any] = {"shuffle": shuffle, "drop_last": drop_last}
    one = bound(count, size, 1, 0, 7, **options)
    shares = [
        bound(count, size, shards, r, 7, whole_batches=whole_batches, **options)
        for r in range(shards)
    ]
    for _ in range(2):
        expected = list(one)
        found = [list(share) for share in shares]
        assert [len(each) for each in found] == [len(one)] * shards
        for batch, *parts in zip(expected, *found, strict=True):
            assert torch.equal(batch, torch.cat(parts))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
        seen = [int(row[0]) for batch in expected for row in batch]
        assert sorted(set(seen)) == sorted(seen)
        assert len(seen) == (count // size * size if drop_last else count)
        assert shuffle or seen == list(range(len(seen)))


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 30))
def test_it_goes_on_where_it_was(count: int, size: int, taken: int) -> None:
    """After any number of batches, under another number of shares."""

    def forever(loader: DataSetLoader) -> Iterator[torch.Tensor]:
        while True:
            yield from loader

    first, second = (bound(count, size, 1, 0, seed, shuffle=True) for seed in (1, 2))
    running = forever(first)
    for _ in range(taken):
        next(running)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    others = forever(second)
    for _ in range(2 * len(first)):
        assert torch.equal(next(running), next(others))


def test_a_pass_that_was_left_is_over() -> None:
    loader = bound(6, 2, 1, 0, 0)
    assert next(iter(loader)).tolist() == [[0, 0], [1, 10]]
    assert [int(batch[0, 0]) for batch in loader] == [0, 2, 4]
    assert loader.epoch == 2


def test_positions_wait_for_loaders() -> None:
    loaders = DataSetLoaders()
    loaders.load_state_dict({"loaders": [{"epoch": 1, "batch": 2, "seed": 5}]})
    loader = bound(6, 2, 1, 0, 0)
    loaders.add(loader)
    assert loaders.state_dict() == {"loaders": [{"epoch": 1, "batch": 2, "seed": 5}]}
    assert [int(batch[0, 0]) for batch in loader] == [4]
    del loader
    assert loaders.empty


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("dataset", "size", "options", "message"),
    [
        (Endless(), 2, {}, "an? Endless has none: give it to a DataLoader of yours"),
        (Numbers(3), 0, {}, "batch_size=0: give the rows of a global batch"),
        (Numbers(3), 2.0, {}, r"batch_size=2\.0"),
        (Numbers(3), 2, {"sampler": 1}, "no option 'sampler': it takes shuffle, drop_last"),
    ],
)
def test_bad_options(dataset: Any, size: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        piped().loader(dataset, size, **options)


def trained(folder: str | None, until: int, dp: int, n_stages: int) -> Any:
    """Losses of some passes with ends of one row, saved or resumed in the middle of one."""
    pipe = piped(n_stages=n_stages, dp=dp, microbatches=1, seed=1, example_batch=example(dp))
    loader = pipe.loader(rows(), 4, shuffle=True, collate_fn=collated)
    if folder and any(Path(folder).iterdir()):
        pipe.load(folder)
    losses, done = [], 0
    for _ in range(loader.epoch, 2):
        for batch in loader:
            losses.append(pipe.step(batch))
            done += 1
            if done == until:
                if folder:
                    pipe.save(folder)
                return losses, pipe.state_dict()
    return losses, pipe.state_dict()


def example(dp: int) -> Row:
    shares = dp if "RANK" in os.environ else 1
    return collated(rows()[: 4 // shares])


def test_training_goes_on_in_the_middle_of_a_pass(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    """In one process, then in two, with the bits of a run that was not interrupted."""
    expected, state = trained(None, -1, 2, 1)
    assert len(expected) == 8
    before, _ = trained(str(tmp_path), 6, 2, 1)
    for after, resumed in gang(2).run(trained, str(tmp_path), -1, 2, 1):
        assert torch.equal(torch.stack(expected), torch.stack([*before, *after]))
        assert all(torch.equal(resumed[name], each) for name, each in state.items())

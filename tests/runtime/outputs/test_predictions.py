"""What a model returns for all rows, whoever has computed them: in their order, on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from pipecompile.errors import BatchError, OptionError
from pipecompile.runtime.transport.neighbours import SWITCH
from support import rated
from support.gang import Gang
from support.matrix import quickly
from torch import nn


def share(batch: rated.Rows, pipe: Any) -> rated.Rows:
    """This process's rows, as `Pipeline.loader` deals them."""
    rows, count = len(batch["labels"]), pipe.data_shards
    sizes = [rows // count + (i < rows % count) for i in range(count)]
    return {k: v.split(sizes)[pipe.data_shard] for k, v in batch.items()}


def labelled(output: Any, batch: rated.Rows) -> Any:
    return batch["labels"], {"a": output["logits"]}


def predicted(shared: str = "") -> dict[str, Any]:
    with mock.patch.dict(os.environ, {SWITCH: shared}):
        pipe = rated.pipeline()
        loader = pipe.loader(rated.data_set(), rated.BATCH)
        batch = share(rated.batches()[0], pipe)
        return {
            "all": pipe.predict(loader),
            "main": pipe.predict(loader, gather="main"),
            "kept": pipe.predict(loader, lambda output, _: output["logits"].argmax(-1)),
            "with batch": pipe.predict(loader, labelled),
            "forward": pipe.forward(batch, gather=True),
            "forward main": pipe.forward(batch, gather="main"),
            "forward alone": pipe.forward(batch),
            "one": pipe.predict(batch),
        }


def check(found: dict[str, Any], main: bool, last: bool, rows: slice) -> None:
    logits, labels = rated.returned(rated.Classifier())
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(found["all"]["logits"], logits, **close)
    losses = [rated.Classifier().eval()(**batch)["loss"] for batch in rated.batches()]
    torch.testing.assert_close(found["all"]["loss"], torch.stack(losses).detach(), **close)
    assert torch.equal(found["kept"], logits.argmax(-1))
    assert torch.equal(found["with batch"][0], labels)
    torch.testing.assert_close(found["with batch"][1]["a"], logits, **close)
    for name in ("forward", "one"):
        torch.testing.assert_close(found[name]["logits"], logits[: rated.BATCH], **close)
    torch.testing.assert_close(found["forward"]["loss"], losses[0].detach(), **close)
    assert (found["main"] is not None) == (found["forward main"] is not None) == main
    if main:
        assert torch.equal(found["main"]["logits"], found["all"]["logits"])
        assert torch.equal(found["forward main"]["logits"], found["forward"]["logits"])
    assert (found["forward alone"] is not None) == last
    if last:
        alone = found["forward alone"]["logits"]
        torch.testing.assert_close(alone, logits[: rated.BATCH][rows], **close)


def test_one_process() -> None:
    check(predicted(), True, True, slice(None))


@pytest.mark.parametrize("shared", quickly([""], ["", "off"]))
def test_many_processes(gang: Callable[[int], Gang], shared: str) -> None:
    """Ranks 0 and 2 have first stages, 1 and 3 the last ones of two replicas, of 3 and 2 rows."""
    for rank, found in enumerate(gang(4).run(predicted, shared)):
        check(found, rank == 0, rank in (1, 3), slice(0, 3) if rank == 1 else slice(3, 5))


class Odd(nn.Module):
    """Outputs of every kind: by rows in another dimension, the same for all rows, and sums."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.second(self.first(x).tanh())
        return {"turned": y.T, "weight": self.first.weight * 2, "sum": y.sum(), "mean": y.mean()}


def test_outputs_of_other_kinds() -> None:
    rows = torch.randn(7, 4)
    pipe = pipecompile.compile(Odd(), 2, 2, microbatches=2, loss_fn=lambda out, _: out["mean"])
    found = pipe.predict(iter([rows[:4], rows[4:]]))
    with torch.no_grad():
        whole, parts = Odd()(rows), [Odd()(rows[:4]), Odd()(rows[4:])]
    torch.testing.assert_close(found["turned"], whole["turned"])
    assert torch.equal(found["weight"], whole["weight"])
    for name in ("sum", "mean"):  # once per batch
        torch.testing.assert_close(found[name], torch.stack([part[name] for part in parts]))


class Tokens(nn.Module):
    """Scores for each token: outputs are as long as rows are."""

    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(rated.WORDS, 4), nn.Linear(4, rated.WORDS)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.table(ids).tanh())  # (rows, length, words)
        return {"loss": logits.square().mean(), "logits": logits}


def rows_of(length: int) -> rated.Rows:
    return {"ids": torch.ones(2, length, dtype=torch.long)}


def last_token(output: Any, _: Any) -> torch.Tensor:
    found: torch.Tensor = output["logits"][:, -1]
    return found


def test_lengths_that_cannot_be_joined_are_said() -> None:
    pipe = pipecompile.compile(Tokens(), 1, microbatches=1)
    data = [rows_of(5), rows_of(7)]
    with pytest.raises(BatchError, match=r"'logits' of shapes \[2, 5, 16\] and \[2, 7, 16\] .*fn="):
        pipe.predict(iter(data))
    assert pipe.predict(iter(data), last_token).shape == (4, rated.WORDS)


def test_what_fn_may_return() -> None:
    pipe, data = rated.pipeline(1, 1, 1), rated.batches()
    with pytest.raises(BatchError, match=r"predict\(fn=\) returned a number: return tensors"):
        pipe.predict(iter(data), lambda output, _: output["loss"])
    with pytest.raises(BatchError, match=r"predict\(fn=\) raised KeyError: 'scores'"):
        pipe.predict(iter(data), lambda output, _: output["scores"])
    with pytest.raises(OptionError, match="gather='everyone': use \"all\""):
        pipe.predict(iter(data), gather="everyone")
    with pytest.raises(OptionError, match="gather=2: use"):
        pipe.forward(data[0], gather=2)  # type: ignore[arg-type]


def padded_apart() -> str:
    """Replicas of other lengths, whose outputs cannot be joined; fn makes ones that can."""
    pipe = pipecompile.compile(Tokens(), 1, 2, microbatches=1)
    batch = rows_of(5 + 2 * pipe.data_shard)
    assert pipe.predict(batch, last_token).shape == (4, rated.WORDS)
    with pytest.raises(BatchError, match="cannot be joined by rows") as caught:
        pipe.forward(batch, gather=True)
    return str(caught.value)


def test_replicas_of_other_lengths(gang: Callable[[int], Gang]) -> None:
    first, second = gang(2).run(padded_apart)
    assert first == second
    assert "'logits' of shapes [2, 5, 16] and [2, 7, 16]" in first

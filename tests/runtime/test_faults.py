"""A run that fails says where, and leaves nothing behind: the next one is as if it had not been."""

from __future__ import annotations

from functools import partial
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import errors
from support import plain
from support.matrix import quickly
from torch import nn

SGD = partial(torch.optim.SGD, lr=0.1)


class Tagger(nn.Module):
    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.table(ids)), labels)


def batch(**odd: int) -> dict[str, torch.Tensor]:
    """Eight rows; in the fourth, the leaf that is named has the number that is given."""
    made = {name: torch.arange(8) for name in ("ids", "labels")}
    for name, number in odd.items():
        made[name][3] = number
    return made


def compiled(**options: Any) -> Any:
    torch.manual_seed(0)
    options = {"n_stages": 2, "microbatches": 4, **options}
    return pipecompile.compile(Tagger(), optimizer=SGD, **options)


IDS = r"rank 0, 0F1, module 'table' \(aten.embedding.default\): a token id.* for shape \[10, 8\]"
LABELS = r"rank 1, 1F1, the model or loss_fn \(aten.nll_loss_forward.default\): .* Target 10 is out"


@pytest.mark.parametrize(
    ("odd", "message"), [({"ids": 10}, IDS), ({"ids": -1}, IDS), ({"labels": 10}, LABELS)]
)
@pytest.mark.parametrize("call", quickly(["step", "forward"], ["step", "evaluate", "forward"]))
def test_indices_out_of_range(odd: dict[str, int], message: str, call: str) -> None:
    with pytest.raises(errors.BatchError, match=message):
        getattr(compiled(), call)(batch(**odd))


@pytest.mark.parametrize("odd", [{"ids": 10}, {"labels": 10}])
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"schedule": "zb_h1"}, marks=pytest.mark.slow),
        pytest.param({"dp": 2, "microbatches": 2}, marks=pytest.mark.slow),
        {"dp": 2, "microbatches": 2, "zero": 2},
        {"precision": "fp16"},
    ],
)
def test_the_next_step_is_as_if_there_had_been_none(
    options: dict[str, Any], odd: dict[str, int]
) -> None:
    pipe, other = compiled(**options), compiled(**options)
    with pytest.raises(errors.BatchError):
        pipe.step(batch(**odd))
    assert pipe.step(batch()) == other.step(batch())
    pipe.forward_backward(batch())
    with pytest.raises(errors.BatchError):
        pipe.forward_backward(batch(**odd))
    assert all(param.grad is None for param in pipe.parameters())
    assert pipe.step(batch()) == other.step(batch())
    assert plain.equal(pipe.state_dict(), other.state_dict())


def test_other_errors_keep_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """They get a note: out of memory, say, is told by its class."""
    pipe = compiled(example_batch=batch())
    program = pipe.programs.stages[1].forward
    ranks = next(iter(pipe._session.loaded.values())).executors

    def fail(_: Any) -> None:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(program.module, "forward", fail)
    assert program is ranks[1].stages[1].code.forward
    with pytest.raises(torch.OutOfMemoryError) as caught:
        pipe.step(batch())
    assert caught.value.__notes__ == ["in rank 1, 1F0"]

"""What of a batch makes another program, and what of it reaches model and loss."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import UserDict
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pipecompile
import pytest
import torch
from pipecompile import errors
from pipecompile.compiler.capture.batch import flatten
from support import models
from support.matrix import quickly
from torch import nn

X = torch.randn(4, 8)
SGD = partial(torch.optim.SGD, lr=0.1)


class Scaled(nn.Module):
    """Reads ``scale``, and of ``**kwargs`` only ``factor``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor, scale: Any = 1, **others: Any) -> torch.Tensor:
        made: torch.Tensor = self.layers(x) * scale * others.get("factor", 1)
        return made.square().mean()


def compiled(model: nn.Module, **options: Any) -> Any:
    return pipecompile.compile(model, 2, microbatches=1, optimizer=SGD, **options)


NAN = float("nan")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1),
        (1.5, 1.5),
        (NAN, -NAN),
        ("text", "text"),
        (np.float32(2), np.float32(2)),
        (torch.float16, torch.float16),
        (nn.Linear, nn.Linear),
        ([1, {"a": 2}], [1, {"a": 2}]),
    ],
)
def test_equal_values_share_a_program(one: Any, other: Any) -> None:
    first, second = (flatten({"x": X, "value": value})[1] for value in (one, other))
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        (1.0, np.float64(1)),
        ("1", 1),
        (None, False),
        ([1], [1, 1]),
    ],
)
def test_values_that_models_may_tell_apart_do_not(one: Any, other: Any) -> None:
    assert flatten({"x": X, "value": one})[1] != flatten({"x": X, "value": other})[1]


@pytest.mark.parametrize("value", [{1, 2}, SimpleNamespace(a=1), nn.Linear(1, 1)])
def test_values_that_cannot_be_compared(value: Any) -> None:
    with pytest.raises(errors.BatchError, match=r"'value' is a .* give tensors"):
        flatten({"x": X, "value": value})


def test_every_process_describes_values_alike() -> None:
    text = flatten({"x": X, "value": [1.5, compiled]})[1].described()
    assert text.startswith("x: float32[4, 8] ((1, 1.5), (2, <function compiled")
    assert "0x" not in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("extra", [{"factor": 3}, {"count": 48, "wants_all": True}, {"scale": 2.0}])
def test_plain_values_reach_kwargs(extra: dict[str, Any]) -> None:
    model = Scaled()
    assert compiled(model).evaluate({"x": X} | extra) == model(X, **extra)


def test_a_tensor_that_only_kwargs_swallow() -> None:
    model = Scaled()
    with pytest.warns(UserWarning, match=r"Scaled takes 'mask' as \*\*kwargs and reads none"):
        assert compiled(model).evaluate({"x": X, "mask": X}) == model(X, mask=X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(model).evaluate({"x": X, "factor": X}) == model(X, factor=X)


def test_plain_values_reach_loss_fn() -> None:
    def loss_fn(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return output * batch["weight"]

    model = models.Residual(2)
    batch = {"x": X, "weight": 3, "unread": "text"}
    assert compiled(model, loss_fn=loss_fn).evaluate(batch) == model(X) * 3


def test_plain_values_reach_kwargs_beside_loss_fn() -> None:
    model = Scaled()
    pipe = compiled(model, loss_fn=lambda output, batch: output * batch["factor"])
    assert pipe.evaluate({"x": X, "factor": 3}) == model(X, factor=3) * 3
    assert pipe.evaluate({"x": X, "factor": torch.tensor(3)}) == model(X) * 3


class Nested(nn.Module):
    """Takes a structure, and reads arrays and lists of its batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self, x: torch.Tensor, more: Any = None, weight: Any = None, wide: Any = None
    ) -> torch.Tensor:
        made = self.outer(self.inner(x).tanh())
        if more is not None:
            made = made + (more.one if dataclasses.is_dataclass(more) else more["one"])
        if weight is not None:
            made = made * weight.to(made.dtype)[:, None]
        if wide is not None:
            made = made.repeat(1, *wide[1:])
        return made.square().mean()


@dataclasses.dataclass
class Pair:
    one: torch.Tensor
    name: str = "pair"


@dataclasses.dataclass
class Whole:
    x: Any
    weight: Any


class Tuple(NamedTuple):
    x: torch.Tensor
    more: Any


ONE = torch.randn(4, 8)
ACROSS = X.T.contiguous().T
WEIGHT = [1, 2, 0, 3]
PLAIN = {"x": X, "weight": torch.tensor(WEIGHT)}
FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "arrays": ({"x": X.numpy(), "weight": np.array(WEIGHT, dtype=np.int32)}, PLAIN),
    "read only": ({"x": np.broadcast_to(X.numpy(), X.shape), "weight": PLAIN["weight"]}, PLAIN),
    "backwards": ({"x": X.flip(0).numpy()[::-1], "weight": PLAIN["weight"]}, PLAIN),
    "lists": ({"x": X, "weight": WEIGHT}, PLAIN),
    "lists of lists": ({"x": X, "more": {"one": ONE.tolist()}}, {"x": X, "more": {"one": ONE}}),
    "a tuple for all rows": ({"x": X, "wide": (1, 2)}, {"x": X, "wide": (1, 2)}),
    "texts": (PLAIN | {"ids": ["a", "b", "c", None], "more": None}, PLAIN),
    "an array of texts": (PLAIN | {"ids": np.array(["a", "b", "c", "d"])}, PLAIN),
    "a UserDict": (UserDict(PLAIN), PLAIN),
    "a dataclass": (Whole(X, WEIGHT), PLAIN),
    "a dataclass inside": ({"x": X, "more": Pair(ONE)}, {"x": X, "more": Pair(ONE)}),
    "a named tuple": (Tuple(X, {"one": ONE}), {"x": X, "more": {"one": ONE}}),
    "a mapping inside": ({"x": X, "more": UserDict(one=ONE)}, {"x": X, "more": {"one": ONE}}),
    "a list of both": ([X, UserDict(one=ONE)], {"x": X, "more": {"one": ONE}}),
    "in shared memory": ({"x": X.clone().share_memory_(), "weight": WEIGHT}, PLAIN),
    "not contiguous": (PLAIN | {"x": ACROSS}, PLAIN | {"x": ACROSS}),
}
QUICK = (
    "backwards",
    "lists of lists",
    "a tuple for all rows",
    "texts",
    "a dataclass inside",
    "a list of both",
    "in shared memory",
)


@pytest.mark.parametrize("form", quickly(QUICK, FORMS))
def test_forms_of_batches(form: str) -> None:
    """In two microbatches; the batch stays what it was."""
    batch, same = FORMS[form]
    kept, model = copy.deepcopy(batch), Nested()
    pipe = pipecompile.compile(model, 2, microbatches=2, optimizer=SGD)
    cut = flatten(same)[1]
    halves = [cut.with_rows(2).build([v[i : i + 2] for v in flatten(same)[0]]) for i in (0, 2)]
    losses = [model(**half).detach() for half in halves]
    assert torch.equal(pipe.step(batch), torch.stack(losses).mean())
    assert repr(batch) == repr(kept)


def test_a_text_that_forward_takes() -> None:
    with pytest.raises(errors.BatchError, match=r"'more' has a text for each row.* encode"):
        compiled(Nested()).step({"x": X, "more": ["a", "b", "c", "d"]})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1], [1, 2], [1], [1]], "'weight' is a list with an item for each row.* pad the rows"),
        (np.zeros(4, dtype="datetime64[s]"), "'weight' is an array of datetime64.* convert it"),
        (np.ones(3), "'weight' has 3 rows, the first leaf 4"),
    ],
)
def test_what_no_tensor_holds(value: Any, message: str) -> None:
    with pytest.raises(errors.BatchError, match=message):
        flatten({"x": X, "weight": value})


class Changing(nn.Module):
    """Writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        mask[:, 0] = 1
        return (self.outer(self.inner(x)) * mask).square().mean()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_batch_stays_as_it_is(microbatches: int) -> None:
    model, mask = Changing(), torch.zeros(4, 8)
    pipe = pipecompile.compile(model, 2, microbatches=microbatches, optimizer=SGD)
    batch = {"x": X.clone(), "mask": mask.clone()}
    first = pipe.evaluate(batch)
    assert torch.equal(batch["x"], X)
    assert torch.equal(batch["mask"], mask)
    assert torch.equal(pipe.evaluate(batch), first)

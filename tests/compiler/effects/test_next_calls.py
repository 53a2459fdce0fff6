"""State, randomness and time in Python: refused where the next call has another graph."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from random import random as imported
from typing import Any

import numpy as np
import pipecompile
import pytest
import torch
from pipecompile.compiler.tensors.fakes import is_fake
from support import jobs
from support.matrix import quickly
from torch import nn

WIDTH = 8
TABLE: dict[int, torch.Tensor] = {}
CALLS = 0


class Helper:
    def __init__(self) -> None:
        self.table: torch.Tensor | None = None
        self.log: list[torch.Tensor] = []


HELPER = Helper()


@functools.lru_cache
def lower(size: int) -> torch.Tensor:
    return torch.ones(size, size).tril()


class Model(nn.Module):
    """Two layers, around what a test gives: from the model and the first one's output."""

    def __init__(self, between: Callable[[Any, torch.Tensor], torch.Tensor], **state: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between = between
        self.__dict__.update(state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.second(self.between(self, self.first(x)))
        return made.square().mean()


def counting(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.count += 1
    return x


def counting_by(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.count += 1
    return x * model.count


def warming_up(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.count += 1
    return x.tanh() if model.count > 100 else x


def counting_globally(model: Any, x: torch.Tensor) -> torch.Tensor:
    global CALLS
    CALLS += 1
    return x / (1 + CALLS)


def once(model: Any, x: torch.Tensor) -> torch.Tensor:
    x, model.new = (x.tanh() if model.new else x), False
    return x


def appending(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.seen.append(1)
    return x * len(model.seen)


def recurrent(model: Any, x: torch.Tensor) -> torch.Tensor:
    x = x if model.hidden is None else x + model.hidden
    model.hidden = x.detach().mean(0)
    return x


def in_a_helper(model: Any, x: torch.Tensor) -> torch.Tensor:
    x = x if HELPER.table is None else x + HELPER.table
    HELPER.table = x.detach().mean(0)
    return x


def logging(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.last, model.took = x, time.time()
    HELPER.log.append(x)
    return x


def passing_on(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.auxiliary = x.square().sum()
    return x + model.auxiliary


def cached(model: Any, x: torch.Tensor) -> torch.Tensor:
    if model.size < x.shape[1]:
        model.size, model.table = x.shape[1], torch.arange(x.shape[1]).cumsum(0) / 9
    return x * model.table


def cached_globally(model: Any, x: torch.Tensor) -> torch.Tensor:
    if WIDTH not in TABLE:
        TABLE[WIDTH] = torch.ones(WIDTH, WIDTH).tril()
    return x @ TABLE[WIDTH] @ lower(WIDTH)


def cached_and_more(model: Any, x: torch.Tensor) -> torch.Tensor:
    """No cache alone: the second call takes another branch, too."""
    if model.table is None:
        model.table = torch.ones(WIDTH)
        x = x.tanh()
    return x * model.table


def in_vain(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Layers are dropped with probability 0."""
    return x if random.uniform(0, 1) < 0 or np.random.uniform(0, 1) < 0 else x.tanh()


RIGHT = {
    "counted": (counting, {"count": 0}),
    "logged": (logging, {}),
    "passed on in the call": (passing_on, {}),
    "cached": (cached, {"size": 0, "table": None}),
    "cached globally": (cached_globally, {}),
    "drawn in vain": (in_vain, {}),
}
REFUSED = {
    "a count": (counting_by, {"count": 0}, r"changes self\.count \(0 -> 1\)"),
    "a count that matters late": (warming_up, {"count": 0}, r"changes self\.count"),
    "a global count": (counting_globally, {}, r"changes .*\.CALLS \(0 -> 1\)"),
    "a flag": (once, {"new": True}, r"changes self\.new \(True -> False\)"),
    "a list": (appending, {"seen": []}, r"changes self\.seen"),
    "a hidden state": (recurrent, {"hidden": None}, r"self\.hidden \(None -> a tensor \[8\]\)"),
    "a hidden state in a helper": (in_a_helper, {}, r"HELPER\.table \(None -> a tensor"),
    "a cache and a branch": (cached_and_more, {"table": None}, r"changes self\.table"),
    "random": (
        lambda _, x: x if random.random() < 0.05 else x.tanh(),
        {},
        r"reads random, at .*\.py",
    ),
    "random.choice": (lambda _, x: x * random.choice([1, 2]), {}, "reads random, at"),
    "random, imported": (lambda _, x: x if imported() < 0.05 else x.tanh(), {}, "reads random"),
    "numpy.random": (lambda _, x: x * np.random.rand(), {}, r"reads numpy\.random, at"),
    "numpy.random.randn": (lambda _, x: x * np.random.randn(), {}, r"reads numpy\.random, at"),
    "a generator": (
        lambda model, x: x * model.draws.random(),
        {"draws": random.Random(0)},
        r"reads self\.draws",
    ),
    "numpy's generator": (
        lambda model, x: x * model.draws.random(),
        {"draws": np.random.default_rng(0)},
        r"reads self\.draws",
    ),
    "time": (lambda _, x: x * time.time(), {}, r"reads time\.time, at .*\.py"),
}


def rows() -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", RIGHT)
def test_what_changes_nothing_that_is_computed_is_right(name: str) -> None:
    between, state = RIGHT[name]
    pipe = pipecompile.compile(Model(between, **state), 2, microbatches=1, optimizer=jobs.SGD)
    model = Model(between, **state)
    losses = [pipe.step(rows()), pipe.evaluate(rows())]
    first = model(rows())
    first.backward()
    jobs.SGD(model.parameters()).step()
    assert torch.equal(losses[0], first)
    assert torch.equal(losses[1], model.eval()(rows()))


QUICK = [
    "a flag",
    "a hidden state",
    "a cache and a branch",
    "random",
    "numpy.random",
    "a generator",
]


@pytest.mark.parametrize("name", quickly(QUICK, REFUSED))
def test_what_the_next_call_computes_otherwise_is_refused(name: str) -> None:
    between, state, message = REFUSED[name]
    pipe = pipecompile.compile(Model(between, **state), 2, microbatches=1, optimizer=jobs.SGD)
    with pytest.raises(pipecompile.errors.CaptureError, match=message):
        pipe.step(rows())


class Preparing(Model):
    """Keeps what evaluation prepares until it is trained again."""

    def __init__(self, prepare: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__(lambda model, x: model.prepared(x))
        self.kept: dict[str, torch.Tensor] = {}
        self.prepare = prepare
        self.register_buffer("count", torch.ones(()))

    def prepared(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return x * self.prepare(self, x)
        if not self.kept:
            self.kept["table"] = self.prepare(self, x)
        return x * self.kept["table"]


class Forgetting(Preparing):
    def train(self, mode: bool = True) -> Any:
        if mode:
            self.kept = {}
        return super().train(mode)


def of_weights(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model.first.weight.sum(0) * model.count


def of_the_batch(model: Any, x: torch.Tensor) -> torch.Tensor:
    return x.mean(0)


def of_what_changes(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.count += 1
    return model.count * 2


def test_what_is_kept_until_the_model_is_trained_again_is_made_anew() -> None:
    model = Forgetting(of_weights)
    pipe = pipecompile.compile(model, 2, microbatches=2, optimizer=jobs.SGD)
    for _ in range(2):
        pipe.step(rows())
        plain = Forgetting(of_weights).eval()
        plain.load_state_dict(pipe.state_dict())
        with torch.no_grad():
            losses = [plain(piece) for piece in rows().chunk(2)]
        assert plain.kept
        for _ in range(2):
            assert torch.equal(pipe.evaluate(rows()), torch.stack(losses).mean())
    assert not model.kept


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Preparing(of_weights), marks=pytest.mark.slow),
        Forgetting(of_the_batch),
        pytest.param(Forgetting(of_what_changes), marks=pytest.mark.slow),
    ],
    ids=["for ever", "of the batch", "of what changes"],
)
def test_what_else_is_kept_in_evaluation_is_refused(model: nn.Module) -> None:
    pipe = pipecompile.compile(model, 2, microbatches=2, optimizer=jobs.SGD)
    pipe.step(rows())
    message = (
        r"in evaluation, .*kept\.table \(nothing -> a tensor .*\(at .*test_next_calls\.py:\d+ "
    )
    with pytest.raises(pipecompile.errors.CaptureError, match=message):
        pipe.evaluate(rows())


@pytest.mark.slow
def test_tracing_leaves_the_world_as_it_was() -> None:
    """The user's own model goes on, with what its functions have kept and what is drawn next."""
    TABLE.clear()
    HELPER.log.clear()
    lower.cache_clear()
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    for between, state in (*RIGHT.values(), (in_a_helper, {})):
        model = Model(between, **state)
        pipe = pipecompile.compile(model, 2, microbatches=1, optimizer=jobs.SGD)
        try:
            pipe.step(rows())
        except pipecompile.errors.CaptureError:
            assert between is in_a_helper
        assert {k: v for k, v in vars(model).items() if k in state} == state
    assert not TABLE
    assert HELPER.table is None
    assert not HELPER.log
    assert (random.random(), np.random.rand()) == expected
    assert not is_fake(lower(WIDTH))

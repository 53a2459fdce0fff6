"""Layers that are given a cache: it is called for each of them, and their operators are copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as hf
from pipecompile.compiler.answers.known import proxy_mode
from pipecompile.compiler.answers.number import plain
from pipecompile.compiler.tracing import templates
from pipecompile.compiler.tracing.helpers import StandIn, is_helper
from support.layered import Layer, Stack, copied, tokens
from support.matrix import quickly
from torch import nn

LAYERS = 5


class Cache:
    """Keeps what layers make, by their numbers.

    Args:
        odd: what layers of odd numbers get back is another's negative.
        written: what is kept was there before, and is written into.
    """

    def __init__(self, odd: bool = False, written: bool = False):
        self.kept: list[torch.Tensor] = []
        self.factor = 1.0
        self.odd, self.written = odd, written
        self.room = torch.zeros((LAYERS, 2, 8, 8)) if written else None

    def update(self, new: torch.Tensor, index: int, /, **more: Any) -> torch.Tensor:
        if self.room is not None:
            self.room[index].copy_(new)
            return self.room[index]
        if self.odd and index % 2:
            new = -new
        whole = torch.cat([torch.tensor([]), new], dim=-2) * self.factor
        self.kept.append(whole)
        return whole

    def __len__(self) -> int:
        return len(self.kept)


class Caching(Layer):
    """Args:
    use: (layer, cache, a tensor) -> what the layer makes of it besides.
    """

    def __init__(self, index: int, use: Callable[..., Any] | None = None):
        super().__init__(index)
        self.use = use
        self.wide = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        keys = self.wide(x).split(8, dim=-1)[1]  # does not begin where its memory does
        y = torch.tanh(cache.update(keys, self.index, more={"flag": True}))
        if self.use is not None:
            y = self.use(self, cache, y)
        return x + self.drop(y) * keys


class Cached(Stack):
    def __init__(self, use: Callable[..., Any] | None = None, **options: Any):
        super().__init__([Caching(i, use) for i in range(LAYERS)])
        self.options = options

    def through(self, x: torch.Tensor) -> torch.Tensor:
        cache = self.cache_of()
        for layer in self.layers:
            x = layer(x, cache)
        return x

    def cache_of(self) -> Cache:
        return Cache(**self.options)


class Holding(Cached):
    """The cache was there before forward, and is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()

    def cache_of(self) -> Cache:
        self.cache.kept.clear()
        return self.cache


def asked(model: nn.Module) -> tuple[int, int, int]:
    """How many layers of the exported graph were copied; of it and the joint one how often the
    cache was called for a copy, and how often it did what it did for the layer before."""
    calls, same = [], []
    again = templates._again

    def counted(*args: Any) -> Any:
        calls.append(args)
        found = again(*args)
        same.append(args)
        return found

    with mock.patch.object(templates, "_again", counted):
        return copied(model), len(calls), len(same)


def test_a_cache_is_called_for_each_layer() -> None:
    assert asked(Cached()) == (LAYERS - 1, 2 * (LAYERS - 1), 2 * (LAYERS - 1))


def test_operators_of_copies_have_the_lines_of_those_that_they_are_copies_of() -> None:
    asks: list[bool] = []

    class Noting(Cache):
        def update(self, new: torch.Tensor, index: int, /, **more: Any) -> torch.Tensor:
            asks.append(proxy_mode().tracer.record_stack_traces)
            return super().update(new, index, **more)

    class Noted(Cached):
        def cache_of(self) -> Cache:
            return Noting()

    assert copied(Noted()) == LAYERS - 1
    copies = [False] * (LAYERS - 1)
    assert asks[:LAYERS] == [True, *copies]


def _table(layer: Any, _: Any, y: torch.Tensor) -> torch.Tensor:
    return y * (1.0, 2.0, 1.0, 2.0, 1.0)[layer.index]


def _odd(layer: Any, _: Any, y: torch.Tensor) -> torch.Tensor:
    return y * 2 if layer.index % 2 else y


def _scaled(layer: Any, _: Any, y: torch.Tensor) -> torch.Tensor:
    return y / (layer.index + 1)


def _divided(layer: Any, _: Any, y: torch.Tensor) -> torch.Tensor:
    return torch.div(y, layer.index + 1)


def _named(layer: Any, _: Any, y: torch.Tensor) -> torch.Tensor:
    return y * 2 if f"layer{layer.index}" == "layer3" else y


def _skipped(layer: Any, _: Any, y: torch.Tensor) -> torch.Tensor:
    return y * 2 if layer.index in {1, 3} else y


def _next(layer: Any, cache: Any, y: torch.Tensor) -> torch.Tensor:
    return y + cache.update(y, layer.index + 1)


def _length(_: Any, cache: Any, y: torch.Tensor) -> torch.Tensor:
    return y * len(cache)


def _factor(_: Any, cache: Any, y: torch.Tensor) -> torch.Tensor:
    return y * cache.factor


def _set(layer: Any, cache: Any, y: torch.Tensor) -> torch.Tensor:
    cache.factor = 2.0
    return y


def _oldest(_: Any, cache: Any, y: torch.Tensor) -> torch.Tensor:
    return y + cache.kept[0]


def _vars(layer: Any, _: Any, y: torch.Tensor) -> torch.Tensor:
    return y * vars(layer)["index"]


def _lacking(_: Any, cache: Any, y: torch.Tensor) -> torch.Tensor:
    return y * getattr(cache, "other", 2.0)


USES = _table, _odd, _named, _length, _factor


@pytest.mark.parametrize("use", quickly([_odd, _factor], USES))
def test_layers_that_use_more_than_what_the_cache_returns_are_traced(
    use: Callable[..., Any],
) -> None:
    assert asked(Cached(use)) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "use", [_scaled, _divided, _skipped, _next, _set, _oldest, _lacking, _vars]
)
def test_other_layers_that_use_more(use: Callable[..., Any]) -> None:
    assert copied(Cached(use)) == 0


def test_a_cache_that_does_something_else_for_a_layer_ends_all_copies() -> None:
    assert asked(Cached(odd=True)) == (1, 2, 0)  # once for each graph, which is traced as ever then


@pytest.mark.slow
def test_a_cache_that_is_written_into_is_not_called_again() -> None:
    assert copied(Cached(written=True)) == 0


@pytest.mark.slow
def test_a_cache_that_the_model_holds_is_not_called_again() -> None:
    assert copied(Holding()) == 0


@pytest.mark.slow
def test_layers_of_a_gpt2_that_keeps_a_cache() -> None:
    config = hf.GPT2Config(n_layer=12, n_embd=16, n_head=2, vocab_size=32, use_cache=True)
    assert asked(hf.GPT2LMHeadModel(config)) == (11, 22, 22)


def test_what_is_a_helper() -> None:
    class Slotted:
        __slots__ = ("kept",)

    class Listed(list[int]):
        pass

    class Watched(Cache):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)

    assert is_helper(Cache())
    assert is_helper(hf.DynamicCache())
    others = (Slotted(), Listed(), Watched(), nn.Linear(1, 1), torch.zeros(1), [], "x", Cache, len)
    assert not any(map(is_helper, others))


def test_a_stand_in_is_the_number_in_all_that_is_done_with_it() -> None:
    used: list[tuple[str, str]] = []
    number = StandIn(("attn", "layer_idx"), 3, used.append)
    assert isinstance(number, int)
    assert number.number == 3
    assert not used
    assert number + 1 == 4
    assert used == [("attn", "layer_idx")]
    assert plain({"a": (number,)}) == {"a": (3,)}
    assert list(range(5))[number] == 3
    assert f"{number}" == "3"
    assert len(used) == 4
    assert tokens()  # and Python's own numbers are as they were

"""What an optimizer takes, told from a few of a model's layers."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.memory import optimizer_cost
from pipecompile.compiler.memory.meter import StorageMeter
from pipecompile.compiler.memory.optimizer_cost import optimizer_memory
from pipecompile.compiler.memory.repeats import ENOUGH, repeats_in
from pipecompile.compiler.tensors.fakes import weightless

ITEMS = st.lists(st.sampled_from("abc"), min_size=0, max_size=4)


@given(ITEMS, ITEMS.filter(bool), st.integers(ENOUGH, ENOUGH + 5), ITEMS, st.integers(1, 3))
def test_every_item_has_its_like_among_those_that_are_left(
    before: list[str], piece: list[str], count: int, after: list[str], left: int
) -> None:
    items = [*before, *piece * count, *after]
    found = repeats_in(items)
    assert found is not None
    assert found.count >= ENOUGH
    kept = [items[i] for i in found.kept(left, len(items))]
    assert len(kept) == len(items) - (found.count - left) * found.length
    assert [kept[found.twin(i, left)] for i in range(len(items))] == items


@given(st.lists(st.integers(), unique=True, max_size=40))
def test_nothing_repeats_in_what_is_different(items: list[int]) -> None:
    assert repeats_in(items) is None


def layers(count: int, odd: int | None = None) -> dict[str, torch.Tensor]:
    """An embedding, layers of three parameters, of which one may be larger, and a head."""
    named = {"embed": torch.empty(32, 8, device="meta")}
    for i in range(count):
        width = 64 if i == odd else 16
        named |= {
            f"{i}.up": torch.empty(width, 8, device="meta"),
            f"{i}.down": torch.empty(8, width, device="meta"),
            f"{i}.bias": torch.empty(8, device="meta"),
        }
    return named | {"head": torch.empty(40, 8, device="meta")}


FACTORIES = (
    torch.optim.AdamW,
    partial(torch.optim.AdamW, amsgrad=True),
    partial(torch.optim.AdamW, foreach=True),
    partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    torch.optim.Adafactor,
)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("odd", [None, 0, 9])
def test_bytes_are_those_of_all_layers_stepped(factory: Any, odd: int | None) -> None:
    params = layers(12, odd)

    def called(named: Any) -> torch.optim.Optimizer:  # nobody knows what this is
        made: torch.optim.Optimizer = factory(named)
        return made

    assert optimizer_memory(factory, params) == optimizer_memory(called, params)


def test_layers_that_repeat_are_not_all_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    measure = optimizer_cost._memory

    def counted(factory: Any, params: Any) -> Any:
        sizes.append(len(params))
        return measure(factory, params)

    monkeypatch.setattr(optimizer_cost, "_memory", counted)
    monkeypatch.setattr(optimizer_cost, "_known", {})
    found = optimizer_memory(torch.optim.AdamW, layers(40))
    told = [2 + 3, 3, 2 + 3 * 2, 3 * 2]
    assert sizes == told
    named = {f"other.{name}": param for name, param in layers(40).items()}
    again = optimizer_memory(torch.optim.AdamW, named)
    assert sizes == told  # alike, under other names
    assert list(again.state_bytes) == list(named)
    assert list(again.state_bytes.values()) == list(found.state_bytes.values())
    optimizer_memory(torch.optim.AdamW, layers(30))
    assert sizes == told  # more or fewer of the same layers
    optimizer_memory(partial(torch.optim.AdamW, foreach=True), layers(10))
    assert sizes[4:] == told  # for all at once: that grows evenly


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "factory",
    [
        *FACTORIES,
        *(partial(torch.optim.AdamW, **{how: True}) for how in ("fused", "maximize")),
        partial(torch.optim.RMSprop, momentum=0.5, centered=True),
        *(torch.optim.NAdam, torch.optim.RAdam, torch.optim.ASGD, torch.optim.Adadelta),
    ],
)
def test_operators_that_only_write_need_not_be_run(
    factory: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []

    def noted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run.append(func._schema.name)
        return optimizer_cost.answering(func, args, kwargs)

    with weightless():
        params = {name: torch.empty_like(param, device=device) for name, param in layers(2).items()}
        monkeypatch.setattr(optimizer_cost, "_settings", lambda _: None)
        monkeypatch.setattr(optimizer_cost, "StorageMeter", lambda _: StorageMeter(noted))
        all_run = optimizer_cost._memory(factory, params)
        monkeypatch.undo()
        found = optimizer_cost._memory(factory, params)
    assert found == all_run
    assert any(map(written_into.search, run))  # it has such operators


written_into = re.compile("^aten::(_foreach_)?(add|mul|lerp|sqrt|div|sub|addcmul|_fused_adamw)_$")


@pytest.mark.parametrize("width", [64, 4096])
def test_what_is_largest_may_change_with_the_number_of_layers(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters of two dtypes are stepped one after the other, each all at once. What only three
    layers take may be less than a large head of the other dtype takes, and what all take more."""
    foreach = partial(torch.optim.AdamW, foreach=True)
    params = layers(12)
    params["head"] = torch.empty(width, 8, device="meta", dtype=torch.bfloat16)
    found = optimizer_memory(foreach, params)
    monkeypatch.setattr(optimizer_cost, "repeats_in", lambda _: None)
    monkeypatch.setattr(optimizer_cost, "_known", {})
    assert found == optimizer_memory(foreach, params)

"""Where ranks compute, on machines that are only told of."""

from __future__ import annotations

import pytest
import torch
from pipecompile.runtime.exchange.devices import choose_device, device_of
from pipecompile.runtime.state.filled import numbers_on
from pipecompile.runtime.transport.mesh import Mesh


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that a process makes its current one, of two that there are."""
    found: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    return found


def test_a_process_traces_on_the_device_that_it_computes_on(taken: list[torch.device]) -> None:
    """What is made for "cuda" lies on the current device: that of parameters was another one than
    that of batches on every rank but the first."""
    mesh = Mesh(2, 1, 1)
    device = choose_device("cuda", mesh)
    assert taken == [torch.device("cuda", 1)] == [device_of(1, device, mesh)]


def test_one_process_that_plays_all_ranks_leaves_the_current_device(
    taken: list[torch.device],
) -> None:
    choose_device("cuda", Mesh(2, 1, None))
    assert not taken


def test_numbers_are_filled_in() -> None:
    made = numbers_on(torch.device("cpu"), [0.1, 2.0, 0.1], torch.float32)
    assert torch.equal(torch.stack(made), torch.tensor([0.1, 2.0, 0.1]))
    assert made[0] is made[2]

"""Layouts of parameters on a GPU that is not there."""

from __future__ import annotations

import pytest
import torch
from pipecompile.compiler.memory.optimizer_cost import Factory, on_cuda, optimizer_memory
from pipecompile.compiler.tensors.facts import layout_of
from pipecompile.compiler.tensors.fakes import weightless
from torch.optim import SGD, Adafactor, AdamW


def _params() -> dict[str, torch.Tensor]:
    with weightless():
        return {
            "a": torch.empty(8, 4),
            "as a": torch.empty(8, 4),
            "turned": torch.empty(4, 8).t(),
            "half": torch.empty(8, 4, dtype=torch.bfloat16),
            "elsewhere": torch.empty(8, 4, device="meta"),
        }


def test_every_parameter_has_its_own_layout_on_the_gpu() -> None:
    params = _params()
    moved = on_cuda(params)
    assert list(moved) == list(params)
    for name, param in params.items():
        device = param.device if name == "elsewhere" else torch.device("cuda", 0)
        assert layout_of(moved[name])[:3] == layout_of(param)[:3]
        assert moved[name].device == device
    assert moved["a"] is moved["as a"]  # a layout is made once


@pytest.mark.parametrize("factory", [AdamW, SGD, Adafactor])
def test_parameters_that_are_alike_count_one_by_one(factory: Factory) -> None:
    params = {name: p for name, p in _params().items() if name in ("a", "as a")}
    with weightless():
        apart = {name: torch.empty(8, 4, device="cuda") for name in params}
    assert optimizer_memory(factory, on_cuda(params)) == optimizer_memory(factory, apart)

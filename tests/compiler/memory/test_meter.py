"""The meter of live bytes against examples counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pipecompile.compiler.memory.meter import StorageMeter
from pipecompile.compiler.profiling.synthetic import Synthesizer
from pipecompile.compiler.tensors.fakes import weightless
from support import models, units
from support.matrix import quickly
from support.measured import allocated

KB = 1000  # bytes of 250 floats


def make() -> torch.Tensor:
    return torch.empty(250)


def a_temporary() -> torch.Tensor:
    a = make()
    b = a + 1  # 2 alive
    c = b * 2  # 3
    return c.sum()  # and 4 bytes; a, b, c die


def views() -> torch.Tensor:
    a = make()
    b = a.view(10, 25)[3:].t()
    del a  # the view keeps all of it
    return b


def in_place() -> torch.Tensor:
    a = make()
    a.add_(1).mul_(2)
    torch.add(a, 1, out=a)
    return a


def several_results() -> list[torch.Tensor]:
    a = make()
    values, indices = a.sort()  # 1 + 2: indices are int64
    parts = list(values.split(50))  # views
    del a, values, indices
    return parts


def saved_by_autograd() -> torch.Tensor:
    a = make().requires_grad_()
    b = a.exp()  # saves its result
    return b * 2  # b lives in the graph only


def list_operator() -> list[torch.Tensor]:
    return torch._foreach_add([make(), make()], 1.0)  # 2, then 4, then 2


def literal() -> torch.Tensor:
    return torch.tensor([1.0] * 250)


def resized() -> torch.Tensor:
    return torch.empty(0).resize_(250)


@pytest.mark.parametrize(
    ("function", "peak", "left"),
    [
        (a_temporary, 3 * KB + 4, 4),
        (views, KB, KB),
        (in_place, KB, KB),
        (several_results, 4 * KB, KB),
        (saved_by_autograd, 3 * KB, 3 * KB),
        (list_operator, 4 * KB, 2 * KB),
        (literal, KB, KB),
        (resized, KB, KB),
    ],
)
@pytest.mark.parametrize("fake", [False, True])
def test_it_counts_as_by_hand(
    function: Callable[[], object], peak: int, left: int, fake: bool
) -> None:
    if fake:
        with weightless(), StorageMeter() as meter:
            result = function()
    else:
        with StorageMeter() as meter:
            result = function()
    assert (meter.peak_bytes, meter.current_bytes) == (peak, left)
    del result
    assert meter.current_bytes == 0


def test_what_was_there_before_counts_only_if_held() -> None:
    held, other = make(), make()
    with StorageMeter() as meter:
        meter.hold([held, held.view(10, 25)])
        assert meter.current_bytes == KB
        other.add_(1)
        made = other[:10] + held[:10]
    assert meter.current_bytes == KB + 40
    del held, made
    assert meter.current_bytes == 0
    meter.restart()
    assert meter.peak_bytes == 0


def test_storages_of_dead_tensors_are_not_confused_with_new_ones() -> None:
    """An allocator gives the same address again; each tensor counts while it lives."""
    with StorageMeter() as meter:
        for _ in range(100):
            make().add_(1)
    assert (meter.peak_bytes, meter.current_bytes) == (KB, 0)


@pytest.mark.parametrize("name", quickly(["gpt2"], ["gpt2", "mixtral"]))
@torch.no_grad()
def test_it_agrees_with_the_allocator_on_whole_programs(name: str) -> None:
    (program,) = units.programs(
        units.captured(models.build(name), models.batches(name, 8, 1)[0]), whole=True
    )
    synthesizer, values = Synthesizer(torch.device("cpu")), {}
    for part in program.parts.values():
        values |= synthesizer.arguments(part, values)
        given = [values[port] for port in part.inputs]
        part.module.forward(given.copy())  # kernels keep what they make at first
        with StorageMeter() as meter:
            kept = part.module.forward(given.copy())
        counted = (meter.peak_bytes, meter.current_bytes)
        del kept
        peak, left, made = allocated(lambda p=part, g=given: p.module.forward(g.copy()))
        assert counted == (pytest.approx(peak, rel=1e-3), left)
        values |= dict(zip(part.outputs, made, strict=True))

"""Values cross processes with their strides and bits."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.ir.program import ValueSpec
from pipecompile.runtime.transport import wire
from pipecompile.runtime.transport.transport import Loopback, add_mean_, ordered_mean

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Permuted, sliced, expanded, empty and 0-dim tensors of several dtypes."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    tensor = (torch.randn(shape) * 3).to(draw(st.sampled_from(DTYPES)))
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    for dim, size in enumerate(tensor.shape):
        if size and draw(st.booleans()):
            tensor = tensor.narrow(dim, draw(st.integers(0, size - 1)), 1)
            if draw(st.booleans()):
                tensor = tensor.expand(*(3 if d == dim else -1 for d in range(len(shape))))
    return tensor


def spec_of(tensor: torch.Tensor) -> ValueSpec:
    return ValueSpec("x", tuple(tensor.shape), tensor.stride(), tensor.dtype)


@given(tensors())
def test_bytes_and_back(tensor: torch.Tensor) -> None:
    spec = spec_of(tensor)
    data = wire.to_bytes(tensor, spec)
    room = wire.room_for(spec, CPU)
    assert data.shape == room.shape
    back = wire.from_bytes(room.copy_(data), spec)
    assert torch.equal(back, tensor)
    assert back.stride() == tensor.stride()
    assert back.dtype == tensor.dtype


@given(tensors())
def test_other_strides_are_conformed(tensor: torch.Tensor) -> None:
    """Of expanded values too: a step of 1 and a step of 0 are alike where there is one element."""
    spec = spec_of(tensor)
    other = tensor.contiguous()
    assert wire.conform(other, spec).stride() == spec.stride
    assert torch.equal(wire.conform(other, spec), tensor)


def arrived(values: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a receiver has of values that are sent, and the pieces in which they came."""
    specs = tuple(map(spec_of, values))
    pieces = wire.Bundle(specs).pack(values)
    there = wire.Bundle(specs)
    rooms = there.rooms(CPU)
    filled = [room for room in rooms if room.numel()]
    assert [each.shape for each in filled] == [each.shape for each in pieces]
    for room, piece in zip(filled, pieces, strict=True):
        room.copy_(piece)
    return there.unpack(rooms), pieces


@given(st.lists(tensors(), min_size=1, max_size=5), st.sampled_from([0, 20, 1 << 15]))
def test_values_keep_bits_and_strides(values: list[torch.Tensor], small: int) -> None:
    with mock.patch.object(wire, "SMALL", small):
        found, pieces = arrived(values)
        nbytes = wire.Bundle([spec_of(value) for value in values]).nbytes
    for there, value in zip(found, values, strict=True):
        assert torch.equal(there, value)
        assert there.stride() == value.stride()
        assert there.dtype is value.dtype
    sizes = [wire.size_of(spec_of(value)) for value in values]
    assert nbytes == sum(sizes)
    together = sum(0 < size <= small for size in sizes)
    apart = sum(size > small for size in sizes)
    assert len(pieces) == apart + min(together, 1)


def test_large_values_and_single_ones_are_sent_where_they_lie() -> None:
    large, other = torch.randn(2, wire.SMALL)
    _, pieces = arrived([large, other, torch.ones(3)])
    assert {large.data_ptr(), other.data_ptr()} < {each.data_ptr() for each in pieces}
    alone = torch.ones(3)
    assert arrived([alone])[1][0].data_ptr() == alone.data_ptr()
    narrow = large.view(-1, 8).t()
    assert arrived([narrow])[1][0].data_ptr() == large.data_ptr(), "dense in another order"


def test_small_values_are_aligned_as_torch_aligns_them() -> None:
    found, pieces = arrived([torch.ones(3, dtype=torch.bool), torch.randn(5).double()])
    first = pieces[0].data_ptr()
    assert len(pieces) == 1
    assert (found[1].data_ptr() - found[0].data_ptr()) % wire.ALIGNED == 0
    assert first % wire.ALIGNED == 0


def test_what_follows_from_specs_is_worked_out_once() -> None:
    made: list[Any] = []
    known = wire.Known(lambda specs: made.append(specs) or len(made))
    specs = (ValueSpec("x", (2,), (1,), torch.float32),)
    assert known.of(specs) == known.of(specs) == 1
    assert known.of((*specs,)) == 2
    assert known.of(list(specs)) == 3


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_means_are_added_in_rank_order(replicas: int) -> None:
    parts = [torch.randn(1000) * 10**r for r in range(replicas)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert torch.equal(ordered_mean(parts), total / replicas)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 5])
def test_means_are_added_to_a_total(replicas: int, fresh: bool) -> None:
    total, parts = torch.randn(1000), torch.randn(1000)
    expected = parts / replicas if fresh else total + parts / replicas
    add_mean_(total, parts.clone(), replicas, fresh)
    assert torch.equal(total, expected)


def test_loopback_delivers_in_order_and_notices_unread_messages() -> None:
    loopback, tensor = Loopback(), torch.ones(2)
    first = loopback.receive(0, 1, [spec_of(tensor)], CPU)
    assert not first.ready()
    loopback.send(0, 1, [tensor], [spec_of(tensor)])
    loopback.send(0, 1, [2 * tensor], [spec_of(tensor)])
    assert torch.equal(first.wait()[0], tensor)
    with pytest.raises(AssertionError, match="0→1"):
        loopback.flush()


def test_a_receive_that_is_posted_first_gets_what_is_sent_first() -> None:
    """Whichever is waited for first."""
    loopback, tensor = Loopback(), torch.ones(2)
    first, second = (loopback.receive(0, 1, [spec_of(tensor)], CPU) for _ in range(2))
    loopback.send(0, 1, [tensor], [spec_of(tensor)])
    assert first.ready()
    assert not second.ready()
    loopback.send(0, 1, [2 * tensor], [spec_of(tensor)])
    assert torch.equal(second.wait()[0], 2 * tensor)
    assert torch.equal(first.wait()[0], tensor)

"""Tensors as flat bytes on the wire, and back with the strides that the program was traced with.

A value keeps its strides when it crosses a stage boundary: kernels may choose their algorithm
by layout, so that a copy that is only equal could change the last bit of a gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from ...compiler.ir.program import ValueSpec

T = TypeVar("T")

ALIGNED = 64  # bytes: as torch aligns what it allocates
SMALL = 32 << 10  # bytes of a value that is copied for less than a message of its own costs
MOST_KNOWN = 4096  # messages of which something is kept


def conform(tensor: torch.Tensor, spec: ValueSpec) -> torch.Tensor:
    """The same values in exactly the strides of the spec (nearly always: the tensor itself)."""
    if tensor.stride() == spec.stride:
        return tensor
    if 0 in spec.stride and 0 not in spec.shape:
        return _expanded(_distinct(tensor, spec), spec)
    return empty(spec, tensor.device).copy_(tensor)


def empty(spec: ValueSpec, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=device)


@functools.lru_cache(maxsize=4096)
def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in any order."""
    if 0 in shape:
        return True
    expected = 1
    for step, size in sorted((s, n) for n, s in zip(shape, stride, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= size
    return True


def to_bytes(tensor: torch.Tensor, spec: ValueSpec) -> torch.Tensor:
    """The memory of a tensor as one row of bytes: itself if dense, else a compact copy."""
    if is_dense(spec.shape, spec.stride):
        block = conform(tensor, spec)
    else:
        block = _distinct(tensor, spec).contiguous()
    return block.as_strided((block.numel(),), (1,)).view(torch.uint8)  # shape -> (bytes,)


def write(tensor: torch.Tensor, spec: ValueSpec, memory: torch.Tensor, at: int) -> None:
    """The same as `to_bytes`, into bytes that are there, from one of them on."""
    if is_dense(spec.shape, spec.stride):
        view(memory, spec, at).copy_(tensor)
    else:
        memory[at : at + size_of(spec)].copy_(to_bytes(tensor, spec))


def view(memory: torch.Tensor, spec: ValueSpec, at: int) -> torch.Tensor:
    """A dense value in bytes that begin at a multiple of its dtype's size."""
    start = (memory.storage_offset() + at) // spec.dtype.itemsize
    return memory.view(spec.dtype).as_strided(spec.shape, spec.stride, start)


def read(memory: torch.Tensor, spec: ValueSpec, at: int) -> torch.Tensor:
    """The inverse of `write`; a view where it is dense."""
    if is_dense(spec.shape, spec.stride):
        return view(memory, spec, at)
    return from_bytes(memory[at : at + size_of(spec)], spec)


def size_of(spec: ValueSpec) -> int:
    """Bytes on the wire."""
    shape = spec.shape if is_dense(spec.shape, spec.stride) else _distinct_shape(spec)
    return math.prod(shape) * spec.dtype.itemsize


def room_for(spec: ValueSpec, device: torch.device) -> torch.Tensor:
    """Bytes to receive into."""
    return torch.empty(size_of(spec), dtype=torch.uint8, device=device)


def from_bytes(data: torch.Tensor, spec: ValueSpec) -> torch.Tensor:
    """The inverse of `to_bytes`."""
    flat = data.view(spec.dtype)  # (bytes,) -> (elements,)
    if is_dense(spec.shape, spec.stride):
        return flat.as_strided(spec.shape, spec.stride)
    return _expanded(flat.view(_distinct_shape(spec)), spec)


def _distinct(tensor: torch.Tensor, spec: ValueSpec) -> torch.Tensor:
    """Without the repeats of expanded dimensions."""
    for dim, step in enumerate(spec.stride):
        if step == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _expanded(distinct: torch.Tensor, spec: ValueSpec) -> torch.Tensor:
    """The inverse of `_distinct`, in memory of its own: repeated dimensions from one."""
    shape, device = distinct.shape, distinct.device
    kept = torch.empty_strided(shape, spec.stride, dtype=spec.dtype, device=device)
    return kept.copy_(distinct).expand(spec.shape)


def _distinct_shape(spec: ValueSpec) -> tuple[int, ...]:
    return tuple(
        1 if step == 0 else size for size, step in zip(spec.shape, spec.stride, strict=True)
    )


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED


class Known(Generic[T]):
    """What follows from the specs of messages that are sent again and again: those whose specs are
    one tuple.

    Args:
        make: works it out.
    """

    def __init__(self, make: Callable[[Sequence[ValueSpec]], T]):
        self._make = make
        self._made: dict[int, tuple[Sequence[ValueSpec], T]] = {}

    def of(self, specs: Sequence[ValueSpec]) -> T:
        found = self._made.get(id(specs))
        if found is not None and found[0] is specs:
            return found[1]
        made = self._make(specs)
        if isinstance(specs, tuple):
            if len(self._made) >= MOST_KNOWN:
                self._made.clear()
            self._made[id(specs)] = specs, made  # which keeps the tuple: no other has its id
        return made


class Bundle:
    """How the values of a message travel: small ones in one piece, each other one where it lies.

    Both ends work it out of the specs alone.

    Attributes:
        nbytes: of the values.
    """

    def __init__(self, specs: Sequence[ValueSpec]):
        sizes = [size_of(spec) for spec in specs]
        small = [i for i, size in enumerate(sizes) if 0 < size <= SMALL]
        self._specs, self.nbytes = specs, sum(sizes)
        self._together: dict[int, int] = {}  # number of a value -> where it begins in their piece
        self._piece_bytes = 0
        for i in small if len(small) > 1 else ():
            self._together[i] = self._piece_bytes
            self._piece_bytes += aligned(sizes[i])

    def pack(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Pieces of bytes, in the order in which they are sent; none is empty."""
        pieces = []
        if self._together:
            piece = torch.empty(self._piece_bytes, dtype=torch.uint8, device=values[0].device)
            for i, at in self._together.items():
                write(values[i], self._specs[i], piece, at)
            pieces.append(piece)
        for i, (value, spec) in enumerate(zip(values, self._specs, strict=True)):
            if i not in self._together and (data := to_bytes(value, spec)).numel():
                pieces.append(data)
        return pieces

    def rooms(self, device: torch.device) -> list[torch.Tensor]:
        """Bytes to receive the pieces into; empty ones in the places of values without any."""
        alone = [spec for i, spec in enumerate(self._specs) if i not in self._together]
        rooms = [room_for(spec, device) for spec in alone]
        if self._together:
            rooms.insert(0, torch.empty(self._piece_bytes, dtype=torch.uint8, device=device))
        return rooms

    def unpack(self, rooms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The values, in rooms that are filled."""
        rest = iter(rooms)
        piece = next(rest) if self._together else None
        found = []
        for i, spec in enumerate(self._specs):
            at = self._together.get(i)
            if at is None or piece is None:
                found.append(from_bytes(next(rest), spec))
            else:
                found.append(read(piece, spec, at))
        return found

"""Tensors as flat bytes on the wire, and back with the strides that the program was traced with.

A value keeps its strides when it crosses a stage boundary: kernels may choose their algorithm
by layout, so that a copy that is only equal could change the last bit of a gradient.
"""

from __future__ import annotations

import functools
import math

import torch

from ...compiler.ir.program import ValueSpec


def conform(tensor: torch.Tensor, spec: ValueSpec) -> torch.Tensor:
    """The same values in exactly the strides of the spec (nearly always: the tensor itself)."""
    if tensor.stride() == spec.stride:
        return tensor
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
    shape = _distinct_shape(spec)
    kept = torch.empty_strided(shape, spec.stride, dtype=spec.dtype, device=data.device)
    return kept.copy_(flat.view(shape)).expand(spec.shape)  # repeated dimensions from one


def _distinct(tensor: torch.Tensor, spec: ValueSpec) -> torch.Tensor:
    """Without the repeats of expanded dimensions."""
    for dim, step in enumerate(spec.stride):
        if step == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _distinct_shape(spec: ValueSpec) -> tuple[int, ...]:
    return tuple(
        1 if step == 0 else size for size, step in zip(spec.shape, spec.stride, strict=True)
    )

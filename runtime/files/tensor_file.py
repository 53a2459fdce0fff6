"""safetensors files: written tensor by tensor, synced to the disk; read in part.

The library's own writer wants all tensors of a file in host memory at once; this one wants one at
a time. Layout: 8 bytes with the header's length, a JSON header of name -> dtype, shape and
offsets, the data. Reading is the library's: it checks that header and file size agree.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from ...compiler.ir.errors import CheckpointError
from ...compiler.tensors.facts import short_name
from . import checksums

# dtype's name -> dtype, its name in the format
DTYPES: dict[str, tuple[torch.dtype, str]] = {
    short_name(dtype): (dtype, code)
    for dtype, code in (
        (torch.float64, "F64"),
        (torch.float32, "F32"),
        (torch.float16, "F16"),
        (torch.bfloat16, "BF16"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.complex64, "C64"),
        (torch.int64, "I64"),
        (torch.int32, "I32"),
        (torch.int16, "I16"),
        (torch.int8, "I8"),
        (torch.uint64, "U64"),
        (torch.uint32, "U32"),
        (torch.uint16, "U16"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
    )
}
_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}
_CODES = {code: name for name, (_, code) in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype (by name, such as "float32") of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0].itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Its name in `DTYPES`.

    Raises:
        CheckpointError: safetensors has no such dtype.
    """
    if dtype not in _NAMES:
        raise CheckpointError(f"{dtype} has no place in a safetensors file: use another dtype")
    return _NAMES[dtype]


_BESIDE_BYTES = 1 << 18  # from which on a checksum is worth a second thread


@dataclass(frozen=True)
class FileFacts:
    """What is to be remembered of a file, beside its tensors' checksums: together they are of all
    its bytes.

    Attributes:
        size_bytes: of all of it.
        header: checksum of what stands before the data.
    """

    size_bytes: int
    header: str


def write(
    path: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], torch.Tensor],
    sum_of: Callable[[Any], str] = checksums.of_bytes,
) -> tuple[FileFacts, dict[str, str]]:
    """Write a new file and wait until it is on the disk.

    Args:
        specs: tensor name -> what it is, in any order.
        read: name -> the tensor, on any device; called once for each.
        sum_of: makes checksums of bytes.

    Returns:
        What to remember of the file, and tensor name -> checksum of what was written of it.

    Raises:
        OSError: for example no space left.
    """
    header, starts = layout(specs)
    sums = {}
    with path.open("xb") as file, ThreadPoolExecutor(1) as beside:
        file.write(header)
        for name in starts:
            data = checksums.bytes_of(read(name))
            if specs[name].nbytes < _BESIDE_BYTES:
                sums[name] = sum_of(data)
                file.write(data)
            else:  # neither holds Python's lock
                pending = beside.submit(sum_of, data)
                file.write(data)
                sums[name] = pending.result()
        file.flush()
        os.fsync(file.fileno())
        return FileFacts(file.tell(), sum_of(header)), sums


def layout(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """What a file of these tensors begins with, and tensor name -> the byte that it begins at.

    Wide dtypes come first, so that all data is aligned, as the format recommends.
    """
    order = sorted(specs, key=lambda name: -DTYPES[specs[name].dtype][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end, starts = 0, {}
    for name in order:
        starts[name], spec = end, specs[name]
        end += spec.nbytes
        header[name] = {
            "dtype": DTYPES[spec.dtype][1],
            "shape": list(spec.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text
    return content, {name: len(content) + start for name, start in starts.items()}


class TensorFile:
    """An open file; tensors are read when asked for."""

    def __init__(self, path: Path, opened: Any):
        self._path, self._opened = path, opened
        self.names: frozenset[str] = frozenset(opened.keys())

    def spec(self, name: str) -> TensorSpec:
        """Of one tensor.

        Raises:
            CheckpointError: the file has no such tensor, or one of an unknown dtype.
        """
        if name not in self.names:
            raise CheckpointError(f"{self._path} is damaged: it has no tensor {name!r}")
        found = self._opened.get_slice(name)
        code = found.get_dtype()
        if code not in _CODES:
            raise CheckpointError(f"{self._path}: {name!r} has dtype {code}, which is not known")
        return TensorSpec(_CODES[code], tuple(found.get_shape()))

    def read(
        self, name: str, start: tuple[int, ...] = (), lengths: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """A tensor, or the box of it that begins at ``start``."""
        if lengths is None or not lengths:
            return cast(torch.Tensor, self._opened.get_tensor(name))
        box = tuple(slice(a, a + n) for a, n in zip(start, lengths, strict=True))
        return cast(torch.Tensor, self._opened.get_slice(name)[box])


def check_header(path: Path, facts: FileFacts) -> None:
    """Compare a file's size, and what stands before its data, with what was written.

    Raises:
        CheckpointError: they differ, or it cannot be read.
    """
    if not path.is_file():  # opening a pipe would wait for somebody who writes to it
        raise _no_file(path)
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = min(int.from_bytes(start, "little"), size_bytes)
            header = start + file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it is damaged") from error
    if size_bytes != facts.size_bytes:
        raise CheckpointError(
            f"{path} cannot be read: it has {size_bytes:,} bytes and had {facts.size_bytes:,} when "
            "it was written: it is damaged"
        )
    if checksums.of_bytes(header) != facts.header:
        raise CheckpointError(
            f"{path} is damaged: its header, which says what and where its tensors are, is not "
            "what was written: load another checkpoint, or copy this one again"
        )


def _no_file(path: Path) -> CheckpointError:
    missing = not path.is_symlink() and not path.exists()
    what = "is missing" if missing else "is no file"
    return CheckpointError(f"{path} {what}: the checkpoint is incomplete")


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a file for reading.

    Raises:
        CheckpointError: it is missing, cut off, or no safetensors file.
    """
    if not path.is_file():
        raise _no_file(path)
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it is damaged") from error
    with file:
        yield TensorFile(path, file)
